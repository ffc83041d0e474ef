"""Scores of pairs (regulator, target) that a network model has to beat: from expression, from labels, from texts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal, Self

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray
from scipy import sparse

from pertura.effects import clr, shrunken_power

Floats = NDArray[np.float64]


class NetworkBaseline(ABC):
    """What the baselines of networks share: fit once, score any pairs.

    Attributes
    ----------
    uses_labels
        Whether `fit` needs training pairs. What does not can score every split of a network after one fit.
    """

    uses_labels: ClassVar[bool] = False

    @abstractmethod
    def fit(self, adata: AnnData | None, train: pd.DataFrame | None = None) -> Self:
        """Learn from expression, from what is known of the genes, or from labeled pairs.

        Parameters
        ----------
        adata
            Cells x genes; what is not used may be `None`.
        train
            Training pairs: ``source``, ``target``, boolean ``label``.
        """

    @abstractmethod
    def score(self, pairs: pd.DataFrame) -> Floats:
        """Score of each pair (``source``, ``target``), ``(n_pairs,)``; larger is more likely an edge."""

    def __repr__(self) -> str:
        """Name and settings: what a file of results is continued by."""
        settings = {k: v for k, v in vars(self).items() if not k.endswith("_")}
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in sorted(settings.items()))})"


class Correlation(NetworkBaseline):
    r"""Absolute correlation of the expression of two genes: no direction, no prior.

    Parameters
    ----------
    layer
        `None` for ``X``. Values should be on a log scale.
    kind
        ``"pearson"``; ``"partial"``: given all other genes, of the covariance shrunk by Ledoit and Wolf; ``"whitening"``: the same
        with its inverse square root in place of its inverse; ``"clr"``: the correlation's mutual information against that of each
        of the two genes with all others.
    center_cells
        Subtract the mean of each cell over standardized genes first, which differs with its depth and quality.

    References
    ----------
    Faith et al. 2007, PLoS Biol 5:e8 (CLR).
    """

    def __init__(
        self,
        *,
        layer: str | None = None,
        kind: Literal["pearson", "partial", "whitening", "clr"] = "pearson",
        center_cells: bool = False,
    ) -> None:
        if kind not in ("pearson", "partial", "whitening", "clr"):
            raise ValueError(f"`kind` must be 'pearson', 'partial', 'whitening' or 'clr', got {kind!r}.")
        self.layer, self.kind, self.center_cells = layer, kind, center_cells

    def fit(self, adata: AnnData, train: pd.DataFrame | None = None) -> Self:
        """See :meth:`NetworkBaseline.fit`."""
        z = _standardized(adata, self.layer)
        if self.center_cells:
            varies = z.any(0)
            z = _unit_variance(varies * (z - z[:, varies].mean(1, keepdims=True)))
        self.genes_ = adata.var_names.astype(str)
        if self.kind in ("partial", "whitening"):
            self.weight_ = np.abs(shrunken_power(z, -1.0 if self.kind == "partial" else -0.5))
            return self
        self.weight_ = np.abs(z.T @ z) / len(z)
        if self.kind == "clr":
            self.weight_ = clr(self.weight_)
        return self

    def score(self, pairs: pd.DataFrame) -> Floats:
        """See :meth:`NetworkBaseline.score`."""
        return self.weight_[_positions(pairs, "source", self.genes_), _positions(pairs, "target", self.genes_)]


class TreeEnsemble(NetworkBaseline):
    """How much each regulator's expression helps trees to predict the target's (GENIE3).

    For each target a forest of regression trees on the standardized expression of all regulators but itself; the score is the
    reduction of the target's variance at splits on the regulator, averaged over trees.

    Parameters
    ----------
    regulators
        Column of ``var`` that marks regulators, names, or `None` for all genes.
    layer
        `None` for ``X``.
    method
        ``"extra_trees"``: random thresholds, the faster; ``"random_forest"``: best thresholds on bootstrap samples, as GENIE3.
    n_estimators
        Trees per target.
    min_samples_leaf
        Fewest cells of a leaf; 1 grows trees to the end as GENIE3 does, more is faster.
    seed
        Of the trees.
    n_jobs
        Processes, as in scikit-learn.

    References
    ----------
    Huynh-Thu et al. 2010, PLoS One 5:e12776.
    """

    def __init__(
        self,
        *,
        regulators: str | Sequence[str] | None = None,
        layer: str | None = None,
        method: Literal["extra_trees", "random_forest"] = "extra_trees",
        n_estimators: int = 100,
        min_samples_leaf: int = 1,
        seed: int = 0,
        n_jobs: int | None = None,
    ) -> None:
        if method not in ("extra_trees", "random_forest"):
            raise ValueError(f"`method` must be 'extra_trees' or 'random_forest', got {method!r}.")
        self.regulators = regulators if regulators is None or isinstance(regulators, str) else list(regulators)
        self.layer, self.method, self.seed, self.n_jobs = layer, method, seed, n_jobs
        self.n_estimators, self.min_samples_leaf = n_estimators, min_samples_leaf

    def fit(self, adata: AnnData, train: pd.DataFrame | None = None) -> Self:
        """See :meth:`NetworkBaseline.fit`."""
        from sklearn.ensemble import ExtraTreesRegressor, RandomForestRegressor

        cls = ExtraTreesRegressor if self.method == "extra_trees" else RandomForestRegressor
        self.genes_ = adata.var_names.astype(str)
        self.regulators_ = self._names(adata)
        z = _standardized(adata, self.layer).astype(np.float32)
        rows = self.genes_.get_indexer(self.regulators_)
        self.weight_ = np.zeros((len(rows), len(self.genes_)))
        settings = {"n_estimators": self.n_estimators, "min_samples_leaf": self.min_samples_leaf}
        settings |= {"max_features": "sqrt", "n_jobs": self.n_jobs}
        for target in range(len(self.genes_)):  # one forest per target
            own = np.flatnonzero(rows != target)
            forest = cls(random_state=self.seed, **settings).fit(z[:, rows[own]], z[:, target])
            found = [tree.tree_.compute_feature_importances(normalize=False) for tree in forest.estimators_]
            self.weight_[own, target] = np.mean(found, axis=0)
        return self

    def _names(self, adata: AnnData) -> pd.Index:
        genes = adata.var_names.astype(str)
        if self.regulators is None:
            return genes
        if isinstance(self.regulators, str):
            if self.regulators not in adata.var:
                raise ValueError(f"`regulators`: `adata.var` has no column {self.regulators!r}.")
            return genes[adata.var[self.regulators].to_numpy(bool)]
        missing = [g for g in self.regulators if g not in genes]
        if missing:
            raise ValueError(
                f"`regulators`: {len(missing)} of {len(self.regulators)} are no genes, e.g. {missing[:3]}."
            )
        return pd.Index(self.regulators)

    def score(self, pairs: pd.DataFrame) -> Floats:
        """See :meth:`NetworkBaseline.score`."""
        return self.weight_[_positions(pairs, "source", self.regulators_), _positions(pairs, "target", self.genes_)]


class RegulatorRate(NetworkBaseline):
    """Share of a regulator's training pairs that are edges: knows no target, and no regulator that it was not trained on."""

    uses_labels = True

    def fit(self, adata: AnnData | None, train: pd.DataFrame) -> Self:
        """See :meth:`NetworkBaseline.fit`."""
        _check_train(train)
        self.rate_ = train["label"].astype(float).groupby(train["source"].astype(str)).mean()
        self.mean_ = float(train["label"].mean())
        return self

    def score(self, pairs: pd.DataFrame) -> Floats:
        """See :meth:`NetworkBaseline.score`."""
        return self.rate_.reindex(pairs["source"].astype(str)).fillna(self.mean_).to_numpy(np.float64)


class OneHotLogistic(NetworkBaseline):
    """Logistic regression on the names alone, one coefficient per regulator and one per target.

    What it reaches is explained by how many edges each gene has; genes it was not trained on have coefficient 0.

    Parameters
    ----------
    C
        Inverse strength of the ridge penalty.
    """

    uses_labels = True

    def __init__(self, *, C: float = 1.0) -> None:
        self.C = C

    def fit(self, adata: AnnData | None, train: pd.DataFrame) -> Self:
        """See :meth:`NetworkBaseline.fit`."""
        _check_train(train)
        self.sources_, self.targets_ = (pd.Index(train[c].astype(str).unique()) for c in ("source", "target"))
        self.model_ = _logistic(self._features(train), train["label"], self.C)
        return self

    def _features(self, pairs: pd.DataFrame) -> sparse.csr_matrix:
        parts = []
        for column, names in (("source", self.sources_), ("target", self.targets_)):
            at = names.get_indexer(pairs[column].astype(str))
            known = np.flatnonzero(at >= 0)
            shape = (len(pairs), len(names))
            parts.append(sparse.csr_matrix((np.ones(len(known)), (known, at[known])), shape=shape))
        return sparse.hstack(parts, format="csr")

    def score(self, pairs: pd.DataFrame) -> Floats:
        """See :meth:`NetworkBaseline.score`."""
        return self.model_.decision_function(self._features(pairs))


class EmbeddingLogistic(NetworkBaseline):
    """Logistic regression on the embeddings of regulator and target: no expression.

    Parameters
    ----------
    embedding_key
        Key of ``varm`` (:func:`pertura.priors.gene_embeddings`).
    products
        Add the products of the two embeddings, dimension by dimension: without them the score is a sum of something about the
        regulator and something about the target.
    C
        Inverse strength of the ridge penalty, on standardized dimensions.
    """

    uses_labels = True

    def __init__(self, *, embedding_key: str = "gene_embedding", products: bool = False, C: float = 0.01) -> None:
        self.embedding_key, self.products, self.C = embedding_key, products, C

    def fit(self, adata: AnnData, train: pd.DataFrame) -> Self:
        """See :meth:`NetworkBaseline.fit`."""
        _check_train(train)
        self.genes_ = adata.var_names.astype(str)
        h = _embedding(adata, self.embedding_key)
        self.h_ = ((h - h.mean(0)) / np.maximum(h.std(0), 1e-12)).astype(np.float32)
        self.model_ = _logistic(self._features(train), train["label"], self.C)
        return self

    def _features(self, pairs: pd.DataFrame) -> NDArray[np.float32]:
        source, target = (self.h_[_positions(pairs, c, self.genes_)] for c in ("source", "target"))
        return np.hstack([source, target, source * target] if self.products else [source, target])

    def score(self, pairs: pd.DataFrame) -> Floats:
        """See :meth:`NetworkBaseline.score`."""
        return self.model_.decision_function(self._features(pairs)).astype(np.float64)


class EmbeddingCosine(NetworkBaseline):
    """Cosine of the embeddings of regulator and target: no expression, no label.

    Parameters
    ----------
    embedding_key
        Key of ``varm``, centered (:func:`pertura.priors.gene_embeddings` does so).
    """

    def __init__(self, *, embedding_key: str = "gene_embedding") -> None:
        self.embedding_key = embedding_key

    def fit(self, adata: AnnData, train: pd.DataFrame | None = None) -> Self:
        """See :meth:`NetworkBaseline.fit`."""
        self.genes_ = adata.var_names.astype(str)
        h = _embedding(adata, self.embedding_key)
        self.h_ = h / np.maximum(np.linalg.norm(h, axis=1, keepdims=True), 1e-12)
        return self

    def score(self, pairs: pd.DataFrame) -> Floats:
        """See :meth:`NetworkBaseline.score`."""
        source, target = (self.h_[_positions(pairs, c, self.genes_)] for c in ("source", "target"))
        return np.einsum("ij,ij->i", source, target)


def _standardized(adata: AnnData, layer: str | None) -> Floats:
    """Expression with mean 0 and variance 1 per gene; genes that do not vary are 0."""
    if layer is not None and layer not in adata.layers:
        raise ValueError(f"`layer`: `adata.layers` has no {layer!r} (layers: {list(adata.layers)}).")
    values = adata.X if layer is None else adata.layers[layer]
    x = np.asarray(values.toarray() if hasattr(values, "toarray") else values, np.float64)
    return _unit_variance(x)


def _unit_variance(x: Floats) -> Floats:
    x = x - x.mean(0)
    sd = x.std(0)
    return np.where(sd > 1e-12, x / np.maximum(sd, 1e-12), 0.0)


def _embedding(adata: AnnData, key: str) -> Floats:
    if key not in adata.varm:
        raise ValueError(
            f"`embedding_key`: `adata.varm` has no {key!r} (keys: {list(adata.varm)}); make one with "
            "`pertura.priors.gene_embeddings`."
        )
    return np.asarray(adata.varm[key], np.float64)


def _positions(pairs: pd.DataFrame, column: str, genes: pd.Index) -> NDArray[np.intp]:
    at = genes.get_indexer(pairs[column].astype(str))
    if (at < 0).any():
        missing = pairs[column].astype(str)[at < 0].unique()
        raise ValueError(f"`pairs`: {len(missing)} genes in {column!r} are unknown, e.g. {list(missing[:3])}.")
    return at


def _check_train(train: pd.DataFrame | None) -> None:
    if train is None or not {"source", "target", "label"} <= set(train.columns):
        raise ValueError("`train` must be a table with the columns 'source', 'target' and 'label'.")
    if train["label"].nunique() < 2:
        raise ValueError("`train` needs pairs that are edges and pairs that are not.")


def _logistic(features: NDArray | sparse.csr_matrix, label: pd.Series, C: float):
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=C, max_iter=1000).fit(features, label.to_numpy(bool))
