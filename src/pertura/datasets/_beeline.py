"""Networks with a ground truth, from the BEELINE benchmark."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
from anndata import AnnData

from ._common import as_categories, as_names, choose, describe, edges_to_csr, new_log
from ._fetch import fetch

__all__ = ["BeelineLabels", "beeline_curated", "beeline_labels", "beeline_mdc"]

_GROUND_TRUTHS = {"string": "STRING", "specific": "Specific", "non-specific": "Non-specific"}


def _clean(edges: pd.DataFrame) -> pd.DataFrame:
    """Without self loops and duplicates, as BEELINE counts edges."""
    edges = edges[edges["source"] != edges["target"]]
    return edges.drop_duplicates(["source", "target"], ignore_index=True)


def signed_edges(network: pd.DataFrame) -> pd.DataFrame:
    """Edges of a simulated network: 1 activates, -1 represses."""
    weight = network["Type"].map({"+": 1.0, "-": -1.0})
    return pd.DataFrame({"source": network["Gene1"], "target": network["Gene2"], "weight": weight})


def _add_truth(adata: AnnData, edges: pd.DataFrame) -> None:
    adata.varp["true_grn"] = edges_to_csr(edges, adata.var_names)
    adata.uns["ground_truth"] = edges


def beeline_mdc(ground_truth: Literal["STRING", "Specific", "Non-specific"] = "STRING") -> AnnData:
    """Mouse dendritic cells after LPS, with a ground-truth network (BEELINE mDC, TFs+500).

    383 cells x 821 genes: all significantly varying transcription factors and the 500 most varying genes.

    Parameters
    ----------
    ground_truth
        ``"STRING"``: functional interactions (264 regulators with targets, 487 genes, 4,815 edges);
        ``"Specific"``: ChIP-seq of the cell type (20, 448, 756); ``"Non-specific"``: ChIP-seq of any cell
        type (250, 643, 3,067). Case does not matter.

    Returns
    -------
    AnnData, cells x genes. ``X``: log expression, float32, dense; no counts exist. ``obs["time"]``: hours
    after LPS; ``var["is_regulator"]``: transcription factor in the benchmark's list. ``uns["ground_truth"]``:
    edges, one row each: ``source``, ``target``, ``weight`` (1), ``score`` (Specific only); no self loops, no
    duplicates. ``varp["true_grn"]``: the same, CSR, ``[source, target]``. Gene names are upper case, as the
    benchmark has them.

    Raises
    ------
    DataNotAvailable
        Neither cache nor network has a file.
    ValueError
        ``ground_truth`` is unknown.

    Notes
    -----
    Candidates of the benchmark are pairs of a regulator that has an edge and a gene that has an edge. Their
    density is 0.038 (STRING), 0.085 (Specific) and 0.019 (Non-specific).

    References
    ----------
    Pratapa et al. 2020, Nat Methods 17:147-154; Shalek et al. 2014, Nature 510:363-369; files of GENELink.
    """
    name = str(ground_truth).casefold()
    choose("ground_truth", _GROUND_TRUTHS.get(name, ground_truth), _GROUND_TRUTHS.values())
    keys = ["beeline_mdc_expression", f"beeline_mdc_{name}_bl--network", f"beeline_mdc_{name}_tf"]
    expression_path, network_path, regulator_path = (fetch(key) for key in keys)

    expression = pd.read_csv(expression_path, index_col=0).T
    edges = pd.read_csv(network_path).rename(columns={"Gene1": "source", "Gene2": "target", "Score": "score"})
    edges.insert(2, "weight", 1.0)
    regulators = pd.read_csv(regulator_path, index_col=0)["TF"]
    genes = as_names(expression.columns)
    cells = as_names(expression.index)
    adata = new_log(
        expression.to_numpy(),
        obs=pd.DataFrame({"time": cells.str.extract(r"_(\d+)h_", expand=False).astype(float)}, index=cells),
        var=pd.DataFrame({"is_regulator": genes.isin(regulators)}, index=genes),
        dataset=describe("beeline_mdc", *keys, ground_truth=_GROUND_TRUTHS[name]),
        scale="log",
    )
    _add_truth(adata, _clean(edges))
    return adata


def beeline_curated(model: Literal["GSD", "HSC"] = "GSD") -> AnnData:
    """Expression simulated from a published Boolean model (BoolODE), with the model's network.

    Parameters
    ----------
    model
        ``"GSD"``: gonadal sex determination, 19 genes; ``"HSC"``: haematopoietic stem cells, 11 genes. 2,000
        cells each.

    Returns
    -------
    AnnData, cells x genes. ``X``: simulated expression, float32, dense, non-negative. ``obs``: ``trajectory``
    (the one the cell is on) and ``pseudotime`` (along it, 0 to 1). ``uns["ground_truth"]``: edges ``source``,
    ``target``, ``weight`` (1 activates, -1 represses), no self loops (GSD: 76 of 79, HSC: 26 of 30);
    ``varp["true_grn"]``: the same, CSR, ``[source, target]``.

    Raises
    ------
    DataNotAvailable
        Neither cache nor network has a file.
    ValueError
        ``model`` is unknown.

    References
    ----------
    Pratapa et al. 2020, Nat Methods 17:147-154.
    """
    choose("model", model, ("GSD", "HSC"))
    stem = f"beeline_{model.lower()}-2000-1"
    keys = [f"{stem}_expressiondata", f"{stem}_refnetwork", f"{stem}_pseudotime"]
    expression_path, network_path, time_path = (fetch(key) for key in keys)

    expression = pd.read_csv(expression_path, index_col=0).T
    edges = signed_edges(pd.read_csv(network_path))
    time = pd.read_csv(time_path, index_col=0).loc[expression.index]
    position, column = np.nonzero(time.notna().to_numpy())  # one trajectory per cell
    if not np.array_equal(position, np.arange(len(time))):
        raise ValueError(f"Not every cell of {model} is on exactly one trajectory.")
    cells = as_names(expression.index)
    adata = new_log(
        expression.to_numpy(),
        obs=pd.DataFrame(
            {
                "trajectory": as_categories(column + 1),
                "pseudotime": time.to_numpy()[position, column],
            },
            index=cells,
        ),
        var=pd.DataFrame(index=as_names(expression.columns)),
        dataset=describe("beeline_curated", *keys, model=model),
        scale="arbitrary",
    )
    _add_truth(adata, _clean(edges))
    return adata


@dataclass(frozen=True)
class BeelineLabels:
    """A ground truth without expression.

    Attributes
    ----------
    edges
        ``source``, ``target``, ``weight`` (1); no self loops, no duplicates.
    genes
        All genes of the set (TFs+500).
    regulators
        The transcription factors among them, with or without an edge.
    """

    edges: pd.DataFrame
    genes: pd.Index
    regulators: pd.Index

    @property
    def density(self) -> float:
        """Edges per candidate: regulators with an edge x genes with an edge, without self pairs."""
        n_regulators = self.edges["source"].nunique()
        n_genes = pd.concat([self.edges["source"], self.edges["target"]]).nunique()
        return len(self.edges) / (n_regulators * n_genes - n_regulators)


def beeline_labels(cell_line: Literal["hESC", "mESC", "hHEP"] = "hESC") -> BeelineLabels:
    """Cell-type-specific ChIP-seq ground truth of a BEELINE set (TFs+500), without its expression.

    Parameters
    ----------
    cell_line
        ``"hESC"`` (910 genes, 4,545 edges, density 0.164), ``"mESC"`` (1,120; 29,613; 0.345) or ``"hHEP"``
        (948; 9,939; 0.379).

    Returns
    -------
    :class:`BeelineLabels`. Its ``edges.attrs["dataset"]`` has the provenance.

    Raises
    ------
    DataNotAvailable
        Neither cache nor network has a file.
    ValueError
        ``cell_line`` is unknown.

    References
    ----------
    Pratapa et al. 2020, Nat Methods 17:147-154; files of GENELink.
    """
    choose("cell_line", cell_line, ("hESC", "mESC", "hHEP"))
    keys = [f"beeline_{cell_line.lower()}_specific_{part}" for part in ("label", "tf", "target")]
    labels, regulators, genes = (pd.read_csv(fetch(key), index_col=0) for key in keys)
    name = genes.set_index("index")["Gene"]
    edges = pd.DataFrame(
        {"source": name[labels["TF"]].to_numpy(), "target": name[labels["Target"]].to_numpy(), "weight": 1.0}
    )
    edges = _clean(edges)
    edges.attrs["dataset"] = describe("beeline_labels", *keys, cell_line=cell_line)
    return BeelineLabels(
        edges=edges,
        genes=pd.Index(genes["Gene"], name="gene"),
        regulators=pd.Index(regulators["TF"], name="gene"),
    )
