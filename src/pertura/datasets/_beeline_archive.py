"""BEELINE's archive: the expression of every set, measured or simulated, and the known networks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final, Literal

import pandas as pd
from anndata import AnnData

from ._beeline import _add_truth, _clean, signed_edges
from ._citations import CITATIONS
from ._common import as_names, choose, new_log
from ._fetch import CONNECT_TIMEOUT, RETRIES, DataHashMismatch, DataNotAvailable, cache_dir

__all__ = ["beeline"]

_DOI: Final = "10.5281/zenodo.3701939"  # one version of the archive, whose files do not change
_READ_TIMEOUT = 120.0
_CHIP: Final = {
    "hESC": "human/hESC",
    "hHep": "human/HepG2",
    "mDC": "mouse/mDC",
    "mESC": "mouse/mESC",
    "mHSC-E": "mouse/mHSC",
    "mHSC-GM": "mouse/mHSC",
    "mHSC-L": "mouse/mHSC",
}
_SIMULATED: Final = re.compile(
    r"(?P<curated>GSD|HSC|mCAD|VSC)-2000-([1-9]|10)(-50|-70)?|(?P<synthetic>dyn-(BF|BFC|CY|LI|LL|TF))-(100|200|500|2000|5000)-([1-9]|10)"
)
_P_VALUE = 0.01  # of BEELINE, over the number of genes


def beeline(
    name: str = "hESC",
    ground_truth: Literal["STRING", "Specific", "Non-specific"] = "STRING",
    *,
    n_genes: int | None = 500,
) -> AnnData:
    """A data set of the BEELINE archive with a known network.

    The archive (262 MB, and 17 MB of networks) is downloaded on first use, checked against the checksum in its own record, and
    what is asked for is unpacked. :func:`beeline_mdc` and :func:`beeline_curated` are small sets that need no archive.

    Parameters
    ----------
    name
        Measured: ``"hESC"``, ``"hHep"``, ``"mDC"``, ``"mESC"``, ``"mHSC-E"``, ``"mHSC-GM"`` or ``"mHSC-L"``. Simulated from a curated
        model: ``"GSD-2000-1"`` to ``"GSD-2000-10"``, likewise ``HSC``, ``mCAD`` and ``VSC``, with dropouts ``"GSD-2000-1-50"`` or
        ``"-70"``. Simulated from a synthetic network: ``"dyn-LI-500-1"``, likewise ``BF``, ``BFC``, ``CY``, ``LL`` and ``TF``, 100, 200,
        500, 2000 or 5000 cells, sample 1 to 10.
    ground_truth
        Of measured cells: ``"STRING"``, ChIP-seq of the cell type (``"Specific"``) or of any (``"Non-specific"``).
    n_genes
        Of measured cells: keep all regulators that vary significantly (p < 0.01, Bonferroni), and so many of the other genes that do,
        by variance, as BEELINE does. `None`: all genes.

    Returns
    -------
    AnnData, cells x genes. ``X``: log expression (simulated: arbitrary unit), float32, dense. ``obsm["pseudotime"]``: one column for each
    trajectory, NaN for cells that are not on it. ``var["is_regulator"]``: in BEELINE's list of transcription factors (measured sets).
    ``uns["ground_truth"]``: edges ``source``, ``target``, ``weight`` (1; -1 represses, for curated and synthetic networks) among the genes, no
    self loops, no duplicates; ``varp["true_grn"]``: the same, CSR, ``[source, target]``. Names of measured genes are in upper case, as
    the networks have them.

    Raises
    ------
    DataNotAvailable
        The archive is neither in the cache nor can it be downloaded.
    DataHashMismatch
        What was downloaded is not what the archive's record says.
    ValueError
        ``name`` or ``ground_truth`` is unknown.

    References
    ----------
    Pratapa et al. 2020, Nat Methods 17:147-154.
    """
    choose("ground_truth", ground_truth, ("STRING", "Specific", "Non-specific"))
    simulated = _SIMULATED.fullmatch(name)
    if simulated is None and name not in _CHIP:
        raise ValueError(
            f"`name` is {name!r}; choose one of {', '.join(map(repr, _CHIP))}, or a simulated set such as 'GSD-2000-1' or 'dyn-LI-500-1'."
        )
    if simulated is None:
        folder = f"scRNA-Seq/{name}"
    elif simulated["curated"]:
        folder = f"Curated/{simulated['curated']}/{name}"
    else:
        folder = f"Synthetic/{simulated['synthetic']}/{name}"
    parts = ("ExpressionData", "PseudoTime", "GeneOrdering" if simulated is None else "refNetwork")
    files = _fetch("BEELINE-data.zip", *(f"BEELINE-data/inputs/{folder}/{part}.csv" for part in parts))
    expression, time, third = (pd.read_csv(file, index_col=None if "Network" in file.name else 0) for file in files)
    var = pd.DataFrame(index=as_names(expression.index))
    if simulated is None:
        edges = _measured(name, ground_truth)
        species = "human" if name.startswith("h") else "mouse"
        (listed,) = _fetch("BEELINE-Networks.zip", f"{species}-tfs.csv")
        expression, third = _upper(expression), _upper(third)
        var = pd.DataFrame(
            {"is_regulator": expression.index.isin(pd.read_csv(listed).iloc[:, 0].str.upper())}, index=expression.index
        )
        if n_genes is not None:
            var = var[_varying(third.reindex(var.index), var["is_regulator"], n_genes)]
        expression = expression.loc[var.index]
        edges = edges[edges["source"].isin(var.index) & edges["target"].isin(var.index)]
    else:
        edges = signed_edges(third)
    adata = new_log(
        expression.to_numpy().T,
        obs=pd.DataFrame(index=as_names(expression.columns)),
        var=var.set_axis(as_names(var.index)),
        dataset={
            "name": "beeline",
            "citation": CITATIONS["beeline"],
            "licence": "CC BY 4.0",
            "origin": "BEELINE on Zenodo",
            "url": f"https://doi.org/{_DOI}",
            "set": name,
            "ground_truth": ground_truth if simulated is None else "refNetwork",
        },
        scale="arbitrary" if simulated else "log",
    )
    time = time.reindex(expression.columns).set_axis([f"trajectory_{i + 1}" for i in range(time.shape[1])], axis=1)
    adata.obsm["pseudotime"] = time.set_axis(adata.obs_names).astype(float)
    _add_truth(adata, _clean(edges))
    return adata


def _measured(name: str, ground_truth: str) -> pd.DataFrame:
    """Known edges of measured cells."""
    species = _CHIP[name].partition("/")[0]
    stem = {
        "STRING": f"{species}/STRING",
        "Specific": f"{_CHIP[name]}-ChIP-seq",
        # the archive's own spelling
        "Non-specific": f"{species}/Non-{'specific' if species == 'human' else 'Specific'}-ChIP-seq",
    }[ground_truth]
    (file,) = _fetch("BEELINE-Networks.zip", f"Networks/{stem}-network.csv")
    pairs = pd.read_csv(file)
    return pd.DataFrame({"source": pairs["Gene1"].str.upper(), "target": pairs["Gene2"].str.upper(), "weight": 1.0})


def _upper(table: pd.DataFrame) -> pd.DataFrame:
    """Names in upper case, the first where two are then the same."""
    table = table.set_axis(table.index.astype(str).str.upper())
    return table[~table.index.duplicated()]


def _varying(order: pd.DataFrame, is_regulator: pd.Series, n_genes: int) -> pd.Series:
    """Which genes BEELINE keeps, by the p value and the variance of each."""
    p_value, variance = order.iloc[:, 0], order.iloc[:, 1]
    found = p_value < _P_VALUE / p_value.notna().sum()
    rank = variance.where(found & ~is_regulator).rank(ascending=False, method="first")
    return (found & is_regulator) | (rank <= n_genes)


def _fetch(archive: str, *members: str) -> list[Path]:
    """Unpacked files of an archive, which is downloaded where one of them is missing."""
    import pooch

    folder = cache_dir() / "beeline_archive"
    paths = [folder / f"{archive}.unzip" / member for member in members]
    if all(path.is_file() for path in paths):
        return paths
    puller = pooch.create(path=folder, base_url=f"doi:{_DOI}", registry=None, retry_if_failed=RETRIES)
    downloader = pooch.DOIDownloader(timeout=(CONNECT_TIMEOUT, _READ_TIMEOUT))
    try:
        puller.load_registry_from_doi()  # checksums, from the record
        puller.fetch(archive, downloader=downloader, processor=pooch.Unzip(members=list(members)))
    except OSError as error:
        raise DataNotAvailable(
            f"{archive} is not in {folder} and could not be downloaded from https://doi.org/{_DOI} ({type(error).__name__}): connect to the "
            f"network, or unpack it to {folder / f'{archive}.unzip'}."
        ) from error
    except ValueError as error:  # pooch: the checksum is another one
        raise DataHashMismatch(
            f"{archive} is not the one in the record of https://doi.org/{_DOI}; nothing was kept."
        ) from error
    lacking = [member for member, path in zip(members, paths, strict=True) if not path.is_file()]
    if lacking:
        raise DataNotAvailable(f"{archive} has no {', '.join(lacking)}.")
    return paths
