"""BEELINE's archive, from a small one of its layout on a local server."""

from __future__ import annotations

import hashlib
import json
import threading
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pandas as pd
import pooch
import pytest

from pertura import datasets
from pertura.datasets import DataHashMismatch, DataNotAvailable

GENES = [f"Gene{i}" for i in range(6)]
MEASURED = "BEELINE-data/inputs/scRNA-Seq/mDC"
DATA = {
    f"{MEASURED}/ExpressionData.csv": ",c1,c2,c3\n"
    + "\n".join(f"{gene},{i},{i + 0.5},{10 * i}" for i, gene in enumerate(GENES)),
    f"{MEASURED}/PseudoTime.csv": ",PseudoTime1,PseudoTime2\nc1,0.1,NA\nc3,0.9,0.3\nc2,NA,0.2\n",
    # 0 and 1 vary most; 2 and 3, which are regulators, less; 5 most of all, but not significantly
    f"{MEASURED}/GeneOrdering.csv": ",VGAMpValue,Variance\nGene0,1e-9,9\nGene1,1e-9,5\nGene2,1e-9,1\nGene3,0.9,2\nGene4,0.001,3\nGene5,0.002,99\n",
    "BEELINE-data/inputs/Curated/VSC/VSC-2000-3-50/ExpressionData.csv": ",E1\nA,1\nB,2\n",
    "BEELINE-data/inputs/Curated/VSC/VSC-2000-3-50/PseudoTime.csv": ",PseudoTime\nE1,0.5\n",
    "BEELINE-data/inputs/Curated/VSC/VSC-2000-3-50/refNetwork.csv": "Gene1,Gene2,Type\nA,B,-\nB,A,+\nA,A,+\n",
}
NETWORKS = {
    "mouse-tfs.csv": "TF\nGENE2\nGENE3\nOTHER\n",
    "Networks/mouse/STRING-network.csv": "Gene1,Gene2\nGENE2,GENE0\nGENE2,GENE2\nGENE2,GENE0\nGENE3,GENE0\nGENE2,GENE4\n",
    "Networks/mouse/mDC-ChIP-seq-network.csv": "Gene1,Gene2,Score\nGENE2,GENE1,7\n",
    "Networks/mouse/Non-Specific-ChIP-seq-network.csv": "Gene1,Gene2\nGENE0,GENE1\n",
}


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        """Write nothing."""


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Folder of the server: two archives and their record. The cache is empty."""
    folder = tmp_path / "served"
    folder.mkdir()
    monkeypatch.setenv("PERTURA_DATA_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as http:
        thread = threading.Thread(target=http.serve_forever, daemon=True)
        thread.start()
        url, files = f"http://127.0.0.1:{http.server_port}", []
        for name, content in (("BEELINE-data.zip", DATA), ("BEELINE-Networks.zip", NETWORKS)):
            with zipfile.ZipFile(folder / name, "w") as packed:
                for member, text in content.items():
                    packed.writestr(member, text)
            checksum = hashlib.md5((folder / name).read_bytes(), usedforsecurity=False).hexdigest()
            files.append({"key": name, "checksum": f"md5:{checksum}", "links": {"self": f"{url}/{name}"}})
        (folder / "3701939").write_text(json.dumps({"id": 3701939, "files": files}))
        record = "https://zenodo.org/records/3701939"
        monkeypatch.setattr(pooch.downloaders, "doi_to_url", lambda doi, **_: {"10.5281/zenodo.3701939": record}[doi])
        monkeypatch.setattr(pooch.downloaders.ZenodoRepository, "base_api_url", url)
        yield folder
        http.shutdown()
        thread.join()


def test_measured_cells(archive: Path) -> None:
    adata = datasets.beeline("mDC", n_genes=1)
    # the significant regulator, and the most varying significant other gene
    assert list(adata.var_names) == ["GENE0", "GENE2"]
    assert list(adata.var["is_regulator"]) == [False, True]
    np.testing.assert_array_equal(adata.X, [[0, 2], [0.5, 2.5], [0, 20]])
    np.testing.assert_array_equal(adata.obsm["pseudotime"]["trajectory_1"], [0.1, np.nan, 0.9])
    assert adata.uns["ground_truth"].to_numpy().tolist() == [["GENE2", "GENE0", 1.0]]
    assert adata.varp["true_grn"][1, 0] == 1
    assert (adata.uns["dataset"]["scale"], adata.uns["dataset"]["set"]) == ("log", "mDC")
    assert list(datasets.beeline("mDC", n_genes=2).var_names) == ["GENE0", "GENE1", "GENE2"]
    assert datasets.beeline("mDC", n_genes=None).n_vars == 6


@pytest.mark.parametrize(("network", "edge"), [("Specific", "GENE2 GENE1"), ("Non-specific", "GENE0 GENE1")])
def test_known_networks(archive: Path, network: str, edge: str) -> None:
    edges = datasets.beeline("mDC", network).uns["ground_truth"]
    assert (edges["source"] + " " + edges["target"]).tolist() == [edge]


def test_simulated_cells(archive: Path) -> None:
    adata = datasets.beeline("VSC-2000-3-50")
    assert (list(adata.var_names), adata.X.tolist(), adata.uns["dataset"]["scale"]) == (
        ["A", "B"],
        [[1, 2]],
        "arbitrary",
    )
    pd.testing.assert_frame_equal(
        adata.uns["ground_truth"], pd.DataFrame({"source": ["A", "B"], "target": ["B", "A"], "weight": [-1.0, 1.0]})
    )


def test_what_is_unpacked_is_not_downloaded_again(archive: Path) -> None:
    datasets.beeline("mDC")
    for file in archive.iterdir():
        file.unlink()
    assert datasets.beeline("mDC").n_vars == 4
    with pytest.raises(DataNotAvailable, match=r"unpack it to .*BEELINE-data\.zip\.unzip"):
        datasets.beeline("mESC")


def test_other_bytes_than_the_record_says_are_refused(archive: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(archive / "BEELINE-data.zip", "a") as packed:
        packed.writestr("more.csv", "")
    with pytest.raises(DataHashMismatch, match="nothing was kept"):
        datasets.beeline("mDC")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_a_set_that_the_archive_lacks(archive: Path) -> None:
    with pytest.raises(DataNotAvailable, match="has no BEELINE-data/inputs/Synthetic/dyn-LI/dyn-LI-500-10"):
        datasets.beeline("dyn-LI-500-10")


@pytest.mark.parametrize("name", ["hesc", "GSD", "GSD-2000-11", "dyn-LI-300-1", "dyn-LI-500-1-50"])
def test_unknown_sets(name: str) -> None:
    with pytest.raises(ValueError, match="`name`"):
        datasets.beeline(name)
