"""What a benchmark runs on: cells, the columns that describe them, and the splits that hold some of them out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
from anndata import AnnData
from numpy.typing import NDArray
from scipy import sparse

from pertura import data as splitters
from pertura import datasets
from pertura.data import Split
from pertura.data._fields import sources
from pertura.data._library import TARGET_SUM, find_library
from pertura.data._validation import check_expression

ALIASES = {"kang": "kang_2018_mini", "papalexi": "papalexi_2021", "norman": "norman_mcfaline_mini"}
KINDS = (
    "unseen_context",
    "few_shot_context",
    "unseen_perturbation",
    "unseen_combination",
    "unseen_dose",
    "held_out_cells",
)


@dataclass(frozen=True, eq=False)
class Dataset:
    """Cells and the columns that describe them.

    Parameters
    ----------
    adata
        Cells x genes.
    name
        Goes into the results.
    perturbation_key, context_key, dose_key
        Columns of ``obs``.
    control
        Label of control cells in `perturbation_key`.
    layer
        What models read: raw counts where there are some; `None` for ``X``.
    setup
        Further arguments of every model's ``setup_anndata``, e.g. ``{"batch_key": "batch"}``.
    """

    adata: AnnData
    name: str
    perturbation_key: str
    control: str
    context_key: str | None = None
    dose_key: str | None = None
    layer: str | None = None
    setup: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        """Check the columns."""
        for argument in ("perturbation_key", "context_key", "dose_key"):
            key = getattr(self, argument)
            if key is not None and key not in self.adata.obs:
                raise ValueError(
                    f"`{argument}`: adata.obs has no column {key!r}; it has {list(self.adata.obs.columns)}."
                )
        if not (self.labels == self.control).any():
            raise ValueError(
                f"`control`: no cell of adata.obs[{self.perturbation_key!r}] is labelled {self.control!r}."
            )

    @classmethod
    def of(cls, data: AnnData | str | Dataset, **keys: Any) -> Dataset:
        """Dataset of an AnnData, of an ``.h5ad`` file, of the name of a loader in :mod:`pertura.datasets`, or as it is.

        Parameters
        ----------
        data
            ``"kang"``, ``"papalexi"`` and ``"norman"`` are short names. Loaders say in ``uns["dataset"]``
            what their columns mean; for other data name them.
        **keys
            Arguments of :class:`Dataset` that are not `None` win.
        """
        given = {k: v for k, v in keys.items() if v is not None}
        if isinstance(data, cls):
            if given:
                raise ValueError(f"`{next(iter(given))}` is already fixed by the `Dataset`; leave it out.")
            return data
        if isinstance(data, str):
            if data.endswith(".h5ad"):
                if not Path(data).is_file():
                    raise ValueError(f"`data`: there is no file {data!r}.")
                return cls.of(ad.read_h5ad(data), **{"name": Path(data).stem, **given})
            loader = getattr(datasets, ALIASES.get(data, data), None)
            if loader is None or data not in {*ALIASES, *datasets.__all__}:
                raise ValueError(
                    f"`data`: there is no data set {data!r}; choose one of {sorted(ALIASES)} or the name of "
                    "a loader in pertura.datasets, or pass an AnnData or the path of an .h5ad file."
                )
            data = loader()
        if not isinstance(data, AnnData):
            raise ValueError(f"`data` must be an AnnData, a name or a Dataset, got {type(data).__name__}.")
        about = data.uns.get("dataset", {})
        known = {k: str(about[k]) for k in ("perturbation_key", "control", "context_key", "dose_key") if k in about}
        if str(about.get("scale", "")) == "counts" and "counts" in data.layers:
            known["layer"] = "counts"
        options = {"name": str(about.get("name", "adata")), **known, **given}
        for needed in ("perturbation_key", "control"):
            if needed not in options:
                raise ValueError(
                    f"`{needed}` is missing: `data` does not say it, so pass it (--{needed.replace('_', '-')} on the command line)."
                )
        return cls(adata=data, **options)

    def only(self, contexts: Sequence[str]) -> Dataset:
        """The same without the cells of other contexts.

        Raises
        ------
        ValueError
            If a context is not there.
        """
        absent = sorted(set(contexts) - set(self.contexts))
        if absent:
            raise ValueError(f"`contexts`: there are no cells of {absent}; there are {sorted(set(self.contexts))}.")
        return replace(self, adata=self.adata[np.isin(self.contexts, list(contexts))].copy())

    @property
    def labels(self) -> NDArray[np.str_]:
        """Perturbation of each cell."""
        return self.adata.obs[self.perturbation_key].astype(str).to_numpy(dtype=str)

    @property
    def contexts(self) -> NDArray[np.str_]:
        """Context of each cell; ``"all"`` without contexts."""
        if self.context_key is None:
            return np.full(self.adata.n_obs, "all")
        return self.adata.obs[self.context_key].astype(str).to_numpy(dtype=str)

    @property
    def doses(self) -> NDArray[np.str_]:
        """Dose of each cell as text; empty without doses and for controls."""
        if self.dose_key is None:
            return np.full(self.adata.n_obs, "")
        text = self.adata.obs[self.dose_key].astype(str).to_numpy(dtype=str)
        return np.where(self.labels == self.control, "", text)

    @property
    def keys(self) -> dict[str, Any]:
        """Arguments of a model's ``setup_anndata``."""
        return {
            "perturbation_key": self.perturbation_key,
            "control": self.control,
            "context_key": self.context_key,
            "dose_key": self.dose_key,
            "layer": self.layer,
            **(self.setup or {}),
        }

    def rows(self, rows: NDArray[np.intp]) -> AnnData:
        """Copy of some cells with nothing that was computed from the others.

        Embeddings, graphs and ``uns`` stay behind, but for the perturbation features that `setup` names.
        """
        part = self.adata[rows]
        layers = {} if self.layer is None else {self.layer: part.layers[self.layer].copy()}
        feature_key = (self.setup or {}).get("perturbation_features_key")
        new = AnnData(X=part.X.copy(), obs=part.obs.copy(), var=part.var.copy(), layers=layers)
        if feature_key is not None:
            for slot in ("uns", "varm"):
                if feature_key in getattr(self.adata, slot):
                    getattr(new, slot)[feature_key] = getattr(self.adata, slot)[feature_key].copy()
        return new

    def expression(self, rows: NDArray[np.intp]) -> Any:
        """Expression of some cells on the scale of the evaluation.

        log1p of counts per 10,000 of the library where the layer holds counts (as models predict it), else the layer itself.
        """
        part = self.adata[rows]
        values = part.X if self.layer is None else part.layers[self.layer]
        kind, library = self._library
        if kind != "counts":
            return values.copy()
        library = np.asarray(values.sum(1), dtype=np.float64).ravel() if library is None else library[rows]
        scaled = sparse.diags(TARGET_SUM / np.maximum(library, 1.0)) @ values
        return scaled.log1p() if sparse.issparse(scaled) else np.log1p(scaled)

    @cached_property
    def _library(self) -> tuple[str, NDArray[np.float64] | None]:
        """Kind of the values, and libraries as models take them; `None` for total counts."""
        key, kind = (self.setup or {}).get("size_factor_key"), check_expression(self.adata, self.layer)
        needs_x = kind == "counts" and key is None
        expression, x = sources(self.adata, self.layer, self.adata.var_names, kind, needs_x)
        return kind, find_library(expression, x, self.adata.obs, self.layer, key)[1]


def make_splits(dataset: Dataset, kind: str, *, seed: int = 0, **options: Any) -> list[Split]:
    """Splits of a data set by the name of the question.

    Parameters
    ----------
    dataset
        Cells and columns.
    kind
        ``"unseen_context"`` (:func:`~pertura.data.leave_context_out`), ``"few_shot_context"``,
        ``"unseen_perturbation"``, ``"unseen_combination"``, ``"unseen_dose"`` or ``"held_out_cells"``.
    seed
        Seed of the random choices.
    **options
        Further arguments of the function in :mod:`pertura.data`.
    """
    if kind not in KINDS:
        raise ValueError(f"`splits` must be one of {KINDS} or a list of Split, got {kind!r}.")
    columns = {"perturbation_key": dataset.perturbation_key}
    if kind != "held_out_cells":
        columns["control"] = dataset.control
    for argument, end in (("context_key", "_context"), ("dose_key", "_dose")):
        if kind.endswith(end):
            if getattr(dataset, argument) is None:
                raise ValueError(f"`{argument}` is missing: {kind!r} needs it.")
            columns[argument] = getattr(dataset, argument)
    if kind == "held_out_cells" and dataset.context_key is not None:
        columns["context_key"] = dataset.context_key
    function = splitters.leave_context_out if kind == "unseen_context" else getattr(splitters, kind)
    return function(dataset.adata, **columns, seed=seed, **options)


def resolve_splits(dataset: Dataset, splits: str | Split | Sequence[Split]) -> list[Split]:
    """List of splits that fit the data."""
    if isinstance(splits, str):
        return make_splits(dataset, splits)
    chosen = [splits] if isinstance(splits, Split) else list(splits)
    if not chosen or not all(isinstance(s, Split) for s in chosen):
        raise ValueError(f"`splits` must be one of {KINDS} or a non-empty list of pertura.data.Split.")
    largest = max(int(part.max()) for s in chosen for part in (s.train, s.val, s.test) if part.size)
    if largest >= dataset.adata.n_obs:
        raise ValueError(
            f"`splits` name row {largest} but the data have {dataset.adata.n_obs} cells; were they made of other data?"
        )
    names = [(s.kind, s.name) for s in chosen]
    if len(set(names)) < len(names):
        raise ValueError("`splits`: two splits have the same kind and name; name them apart.")
    return chosen
