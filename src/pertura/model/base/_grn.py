"""Gene regulatory networks that models learn: as an edge table, in an AnnData, and against known edges."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray
from scipy import sparse

from pertura.metrics._network import score_network

from ._arguments import check_flag, check_key, check_number, check_whole
from ._model import PerturbationModel
from ._write import clear, provenance, reserve

Floats = NDArray[np.float32]
_WRITTEN_PER_GENE = 10  # edges that are written where no limit is asked


@dataclass(frozen=True)
class GeneNetwork:
    """Weights of all pairs of a regulator and a gene.

    Attributes
    ----------
    regulators, genes
        Names of rows and columns.
    weight
        Effect of a regulator (row) on a target (column), ``(n_regulators, n_genes)``; 0 for self loops.
    proba
        Probability that there is an edge, of the same shape, where the model has one.
    prior_mean
        What the model expected of the weight before it saw expression, where it has such a prior.
    rank_by
        Which of the two orders edges: ``"weight"`` (its absolute value) or ``"proba"``.
    direction
        What tells regulator from target: ``"perturbations"``, ``"regulators"`` (a list of them) or ``"none"``.
    """

    regulators: pd.Index
    genes: pd.Index
    weight: Floats
    proba: Floats | None = None
    prior_mean: Floats | None = None
    rank_by: Literal["weight", "proba"] = "weight"
    direction: Literal["perturbations", "regulators", "none"] = "none"

    def __post_init__(self) -> None:
        """Check shapes."""
        shape = (len(self.regulators), len(self.genes))
        for name in ("weight", "proba", "prior_mean"):
            value = getattr(self, name)
            if value is not None and value.shape != shape:
                raise ValueError(f"`{name}` of a network must have shape {shape}, got {value.shape}.")

    def frame(self, name: str = "weight") -> pd.DataFrame:
        """One of the matrices with its names."""
        return pd.DataFrame(getattr(self, name), index=self.regulators, columns=self.genes)

    def edges(self, keep: NDArray[np.bool_]) -> pd.DataFrame:
        """Kept pairs as ``source, target, weight`` (and ``proba``, ``prior_mean``), the first edges first."""
        row, column = np.nonzero(keep)
        order = np.argsort(-np.abs(getattr(self, self.rank_by)[row, column]), kind="stable")
        row, column = row[order], column[order]
        table = {
            "source": self.regulators.to_numpy(object)[row],
            "target": self.genes.to_numpy(object)[column],
            "weight": self.weight[row, column],
        }
        for name in ("proba", "prior_mean"):
            if getattr(self, name) is not None:
                table[name] = getattr(self, name)[row, column]
        frame = pd.DataFrame(table)
        frame.attrs["direction"] = self.direction
        return frame


class GRNModel(PerturbationModel):
    """Base of models that learn a gene regulatory network, which they give by :meth:`_gene_network`."""

    def _gene_network(self) -> GeneNetwork:
        """The learned network; called only once the model is trained."""
        raise NotImplementedError

    def _learned_network(self) -> GeneNetwork:
        self._check_if_trained(warn=False, message="The model is not trained. Call `train()` first.")
        return self._gene_network()

    def get_grn(
        self,
        *,
        regulators: Sequence[str] | None = None,
        targets: Sequence[str] | None = None,
        top_k: int | None = None,
        min_weight: float = 0.0,
        adata: AnnData | None = None,
        key_added: str | None = "grn",
        overwrite: bool = False,
    ) -> pd.DataFrame:
        r"""Edges of the gene regulatory network.

        Parameters
        ----------
        regulators, targets
            Sources and targets to keep; by default all that the model has.
        top_k
            Keep that many edges, the first of the table.
        min_weight
            Keep edges with a larger \|weight\|.
        adata
            Where the edges are written; by default the model's own data, if it has some. Genes are matched by name.
        key_added
            Edges are written to ``varp[key_added]`` (sparse, ``[source, target]``) and ``uns[key_added]`` (the table), what was
            asked to ``uns[key_added + "_params"]``. `None` writes nothing. Where neither `top_k` nor `min_weight` limits the table,
            ten edges per gene are written, the first ones; the returned table has all.
        overwrite
            Whether keys that are not pertura's may be overwritten.

        Returns
        -------
        One row per edge: ``source, target, weight``, as decoupler reads it; ``proba``, the posterior probability of the edge,
        and ``prior_mean`` where the model has them. Positive weights activate. InfoSEM with a prior of the size of weights has
        the most probable edges first, all others the largest \|weight\|. ``attrs["direction"]`` says what tells regulator from
        target: ``"perturbations"``, ``"regulators"`` (a list of them), or ``"none"``: an edge then says that two genes
        are connected, and the order of the two means little.

        Raises
        ------
        ValueError
            For genes that the model does not have, and for keys that hold something of the user's own.
        """
        if top_k is not None:
            check_whole("top_k", top_k)
        check_number("min_weight", min_weight, least=0)
        check_flag("overwrite", overwrite)
        network = self._learned_network()
        keep = np.abs(network.weight) > min_weight
        keep &= _chosen("regulators", regulators, network.regulators)[:, None]
        keep &= _chosen("targets", targets, network.genes)[None, :]
        edges = network.edges(keep)
        if top_k is not None:
            edges = edges.iloc[:top_k].copy()
        if adata is not None and not isinstance(adata, AnnData):
            raise ValueError(f"`adata` must be an AnnData, got {type(adata).__name__}.")
        user = self.adata if adata is None else adata
        if key_added is not None:
            check_key(key_added)
            if user is not None:
                asked = {"top_k": top_k, "min_weight": min_weight, "direction": network.direction}
                limited = top_k is not None or min_weight > 0
                written = edges if limited else edges.iloc[: _WRITTEN_PER_GENE * len(network.genes)]
                _write_network(self, user, written, network.genes, key_added, overwrite, asked)
        return edges

    def evaluate_grn(
        self,
        truth: pd.DataFrame | Iterable[tuple[str, str]],
        *,
        regulators: Sequence[str] | None = None,
        targets: Sequence[str] | None = None,
    ) -> pd.Series:
        r"""Compare the network with known edges; pairs are ranked as in :meth:`get_grn`.

        Parameters
        ----------
        truth
            Known edges: table with columns ``source, target``, or pairs. Edges of genes that the network does not have
            are left out.
        regulators, targets
            Candidate sources and targets; by default those of the known network.

        Returns
        -------
        ``auprc, auprc_ratio, auroc, epr, hit_at, macro_auprc, density, n_edges, n_candidates``, see
        :func:`pertura.metrics.score_network`.
        """
        network = self._learned_network()
        return score_network(network.frame(network.rank_by), truth, regulators=regulators, targets=targets)


def _chosen(argument: str, names: Sequence[str] | None, known: pd.Index) -> NDArray[np.bool_]:
    """Which of the known names were asked."""
    if names is None:
        return np.ones(len(known), dtype=bool)
    if isinstance(names, str):
        names = [names]
    if not len(names) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"`{argument}` must be a list of names of genes, got {names!r}.")
    missing = [name for name in names if name not in known]
    if missing:
        raise ValueError(
            f"`{argument}`: {len(missing)} of {len(names)} names are no {argument} of the model, e.g. {missing[:5]}. "
            f"It has {len(known)}, e.g. {list(known[:3])}."
        )
    return known.isin(names)


def _write_network(
    model: Any,
    user: AnnData,
    edges: pd.DataFrame,
    genes: pd.Index,
    key: str,
    overwrite: bool,
    asked: dict[str, Any],
) -> None:
    names = pd.Index(user.var_names.astype(str))
    missing = genes[~genes.isin(names)]
    if len(missing):
        raise ValueError(
            f"`adata`: {len(missing)} of the model's {len(genes)} genes are missing, e.g. {list(missing[:5])}."
        )
    about = f"{key}_params"
    reserve(user, {"varp": [key], "uns": [key, about]}, overwrite)
    clear(user, about)
    # a regulator that is no measured gene has no row
    inside = edges[edges["source"].isin(names)]
    at = names.get_indexer(inside["source"]), names.get_indexer(inside["target"])
    user.varp[key] = sparse.csr_matrix((inside["weight"].to_numpy(), at), shape=(user.n_vars, user.n_vars))
    table = edges.reset_index(drop=True)
    table.index = table.index.astype(str)  # h5ad stores text
    user.uns[key] = table
    user.uns[about] = provenance(model, wrote=[f"varp/{key}", f"uns/{key}", f"uns/{about}"], **asked)
