"""Networks against known edges, from splits in which every gene was seen to splits in which none was."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray
from scipy.stats import bootstrap

from pertura.data import candidate_pairs, make_grn_splits
from pertura.metrics import EdgeCandidates, auprc, auprc_ratio, auroc, epr, hit_at, macro_auprc

from ._resources import Resources
from ._results import Results
from ._runner import quiet
from ._spec import digest

logger = logging.getLogger(__name__)

GRN_SPLITS = ("edge", "unseen_tf", "unseen_target", "unseen_both")
#: All candidates at once, nothing held out: for what learns from no labels.
EVERYTHING = "all"
_TRUTHS = ("STRING", "Specific", "Non-specific")
_METRICS = ("auprc", "auprc_ratio", "epr", "hit_at", "auroc", "macro_auprc")


class Scorer(Protocol):
    """What the benchmark asks: :class:`pertura.baseline.NetworkBaseline` and :class:`NetworkModel` have it."""

    uses_labels: bool

    def fit(self, adata: AnnData, train: pd.DataFrame | None = None) -> Any:
        """Learn, from training pairs if it uses labels."""

    def score(self, pairs: pd.DataFrame) -> NDArray[np.float64]:
        """Scores of pairs, ``(n_pairs,)``."""


class GivenNetwork:
    r"""A network that is there already, from any tool, as a scorer of pairs.

    Pairs are scored by \|weight\|, or by ``proba`` if the table has the most probable edges first.

    Parameters
    ----------
    edges
        ``source, target, weight`` (and ``proba``); pairs that are not listed have score 0.
    """

    uses_labels = False

    def __init__(self, edges: pd.DataFrame) -> None:
        lacking = [c for c in ("source", "target", "weight") if c not in edges]
        if lacking:
            raise ValueError(f"`edges` lacks the columns {lacking}; it has {list(edges.columns)[:10]}.")
        if edges.duplicated(["source", "target"]).any():
            raise ValueError("`edges` lists some edges twice; aggregate them first, e.g. by their largest weight.")
        names = pd.MultiIndex.from_frame(edges[["source", "target"]].astype(str))
        score = edges["weight"].abs()
        if "proba" in edges and edges["proba"].is_monotonic_decreasing:
            score = edges["proba"]
        self.weight = pd.Series(score.to_numpy(np.float64), index=names)

    def __repr__(self) -> str:
        """Number of edges and a fingerprint of their weights."""
        return f"GivenNetwork({len(self.weight)} edges, {digest(self.weight.to_numpy().tobytes())})"

    def fit(self, adata: AnnData | None, train: pd.DataFrame | None = None) -> GivenNetwork:
        """There is nothing to learn."""
        return self

    def score(self, pairs: pd.DataFrame) -> NDArray[np.float64]:
        """Score of each pair, as every scorer gives it."""
        asked = pd.MultiIndex.from_frame(pairs[["source", "target"]].astype(str))
        return self.weight.reindex(asked).fillna(0.0).to_numpy()


class NetworkModel:
    """A model with ``get_grn`` as a scorer of pairs.

    Parameters
    ----------
    name
        Class in :mod:`pertura.model`.
    train
        Arguments of its ``train``.
    edges
        Whether training pairs are given to the model as known edges (``edges_key``): it is then fitted anew for every split.
    splits
        Kinds of splits that it is scored on; `None`: all. A model that is fitted for each split takes its time.
    seed
        Seed of the model and its training.
    **options
        Arguments of the class.
    """

    def __init__(
        self,
        name: str,
        *,
        train: Mapping[str, Any] | None = None,
        edges: bool = False,
        splits: Sequence[str] | None = None,
        seed: int = 0,
        **options: Any,
    ) -> None:
        self.name, self.train, self.seed, self.options = name, dict(train or {}), seed, options
        self.uses_labels, self.splits = edges, splits

    def __repr__(self) -> str:
        """Name and settings."""
        return f"{self.name}({self.options}, train={self.train}, edges={self.uses_labels}, seed={self.seed})"

    def fit(self, adata: AnnData, train: pd.DataFrame | None = None) -> NetworkModel:
        """Train on all cells; of the labels, only those of the training pairs are known."""
        import torch

        from pertura import model, priors

        adata = adata.copy()
        options = dict(self.options)
        if self.uses_labels:
            if train is None:
                raise ValueError("`train` is missing: this model is given training pairs as known edges.")
            priors.known_edges(adata, train, key_added="_training_edges")
            options["edges_key"] = "_training_edges"
        cls = getattr(model, self.name)
        with quiet(), torch.random.fork_rng():
            torch.manual_seed(self.seed)
            cls.setup_anndata(adata)
            fitted = cls(adata, **options)
            fitted.train(**{"seed": self.seed, "accelerator": "cpu", "enable_progress_bar": False, **self.train})
        self.network_ = GivenNetwork(fitted.get_grn(key_added=None))
        return self

    def score(self, pairs: pd.DataFrame) -> NDArray[np.float64]:
        """Score of each pair, 0 for those that the network does not have."""
        return self.network_.score(pairs)


def grn_models() -> dict[str, Scorer]:
    """Scorers of the command line by name, for the data of :func:`network_data`.

    InfoSEM learns the rows of all genes, of which those of regulators are scored. With known edges (BC) it is fitted for each split,
    with a third of the epochs and for ``"unseen_both"`` alone. ``"paper"`` and ``"deepsem"`` are the presets.
    """
    from pertura import baseline

    def infosem(edges: bool = False, **options: Any) -> NetworkModel:
        return NetworkModel("InfoSEM", edges=edges, splits=("unseen_both",) if edges else None, **options)

    return {
        "correlation": baseline.Correlation(),
        "correlation, centered cells": baseline.Correlation(center_cells=True),
        "partial correlation": baseline.Correlation(kind="partial"),
        "whitening": baseline.Correlation(kind="whitening"),
        "CLR": baseline.Correlation(kind="clr"),
        "trees": baseline.TreeEnsemble(regulators="is_regulator", n_estimators=50),
        "regulator rate": baseline.RegulatorRate(),
        "one-hot LR": baseline.OneHotLogistic(),
        "embedding LR": baseline.EmbeddingLogistic(),
        "embedding LR products": baseline.EmbeddingLogistic(products=True),
        "embedding cosine": baseline.EmbeddingCosine(),
        "InfoSEM none": infosem(prior="none"),
        "InfoSEM B": infosem(prior="embedding"),
        "InfoSEM BC": infosem(edges=True, prior="embedding+edges", train={"max_epochs": 60}),
        "InfoSEM none, regulator rows": infosem(prior="none", regulators="is_regulator"),
        "InfoSEM none, deepsem": infosem(prior="none", preset="deepsem"),
        "InfoSEM none, paper": infosem(prior="none", preset="paper"),
        "InfoSEM B, paper": infosem(prior="embedding", preset="paper"),
    }


def needs_embedding(model: Scorer) -> bool:
    """Whether a scorer of :func:`grn_models` reads gene embeddings."""
    return hasattr(model, "embedding_key") or getattr(model, "options", {}).get("prior", "none") != "none"


_AGAIN = ", fit "  # in names of results, before the number of a fit with another seed
NETWORK_DATA = ("beeline_mdc", "kang", "gsd", "hsc", "simulated", "simulated_controls")


def network_data(name: str = "beeline_mdc", embedding: str = "go_bp") -> tuple[AnnData, dict[str, pd.DataFrame]]:
    """Expression with known networks, by name.

    Parameters
    ----------
    name
        ``"beeline_mdc"``, see :func:`beeline_data`; ``"kang"``: unstimulated blood cells of Kang et al. 2018 (the regulators of the
        networks and the 500 most variable genes), against TRRUST and DoRothEA A to C; ``"gsd"``, ``"hsc"``: BEELINE's curated models;
        ``"simulated"``: counts of knock-outs and controls of :func:`pertura.datasets.simulate`, their labels unused;
        ``"simulated_controls"``: log expression of 1,000 unperturbed cells of one type.
    embedding
        Source of :func:`pertura.priors.gene_embeddings` for data whose genes are real.

    Returns
    -------
    AnnData with ``var["is_regulator"]``, and with ``varm["gene_embedding"]`` where genes are real; known networks by name.
    """
    from pertura import datasets, priors

    if name == "beeline_mdc":
        return beeline_data(embedding)
    if name in ("gsd", "hsc"):
        adata = datasets.beeline_curated(name.upper())
        adata.var["is_regulator"] = True
        return adata, {name.upper(): adata.uns["ground_truth"]}
    if name in ("simulated", "simulated_controls"):
        kind = {"n_genes": 200, "n_perturbations": 10}
        if name == "simulated_controls":
            kind = {"n_genes": 100, "n_perturbations": 1, "n_cells_per_condition": 1, "n_control_cells": 1000}
            kind |= {"n_contexts": 1, "n_unresponsive_contexts": 0, "n_batches": 1, "modality": "log"}
        adata = datasets.simulate(n_regulators=20, seed=0, **kind)
        if name == "simulated_controls":
            adata = adata[adata.obs["perturbation"] == "control"].copy()
        truth = datasets.true_network(adata)
        adata.var["is_regulator"] = adata.var_names.isin(truth["source"])
        return adata, {"planted": truth}
    if name != "kang":
        raise ValueError(f"`name` must be one of {NETWORK_DATA}, got {name!r}.")
    adata = datasets.kang_2018_mini()
    adata = adata[adata.obs["condition"] == "ctrl"].copy()
    adata.X = adata.X.toarray()
    truths = {"TRRUST": datasets.trrust(), "DoRothEA": datasets.dorothea("ABC")}
    adata.var["is_regulator"] = adata.var_names.isin(pd.concat(truths.values())["source"])
    rank = pd.Series(-adata.X.var(0)).rank().to_numpy()
    adata = adata[:, (rank <= 500) | adata.var["is_regulator"]].copy()
    priors.gene_embeddings(adata, embedding)
    genes = adata.var_names
    kept = {n: t[t["source"].isin(genes) & t["target"].isin(genes)] for n, t in truths.items()}
    return adata, {n: t[t["source"] != t["target"]].drop_duplicates(["source", "target"]) for n, t in kept.items()}


def beeline_data(embedding: str = "go_bp") -> tuple[AnnData, dict[str, pd.DataFrame]]:
    """Mouse dendritic cells with gene embeddings, three known networks, and the motifs in promoters where pyarrow is installed.

    Parameters
    ----------
    embedding
        Source of :func:`pertura.priors.gene_embeddings`. With ``"biobert"``, which has vectors for a quarter of the genes, the
        others are left out of the data and of the known networks.

    Returns
    -------
    AnnData with ``varm["gene_embedding"]`` and ``var["is_regulator"]``; known networks by name, and ``"motif"``, see
    :func:`pertura.datasets.motif_network`.
    """
    from pertura import datasets, priors

    found = {name: datasets.beeline_mdc(name) for name in _TRUTHS}
    adata = found[_TRUTHS[0]]
    # each network comes with a list of its own; two regulators are not in that of the first
    adata.var["is_regulator"] = np.logical_or.reduce([a.var["is_regulator"].to_numpy() for a in found.values()])
    if embedding == "biobert":
        vectors = datasets.biobert_mesc500()
        adata = adata[:, priors.match_genes(adata.var_names, vectors.index) >= 0].copy()
    priors.gene_embeddings(adata, embedding)
    truths = {name: a.uns["ground_truth"] for name, a in found.items()}
    if find_spec("pyarrow"):
        motif = datasets.motif_network()
        truths["motif"] = motif.assign(source=motif["source"].str.upper(), target=motif["target"].str.upper())
    genes, regulators = adata.var_names, adata.var_names[adata.var["is_regulator"]]
    kept = {n: t[t["source"].isin(regulators) & t["target"].isin(genes)] for n, t in truths.items()}
    return adata, {n: t[t["source"] != t["target"]] for n, t in kept.items()}


def run_grn(
    adata: AnnData,
    truths: Mapping[str, pd.DataFrame],
    models: Mapping[str, Scorer],
    *,
    splits: Sequence[str] = (EVERYTHING, *GRN_SPLITS),
    seeds: int | Sequence[int] = 10,
    model_seeds: int = 1,
    dataset: str = "",
    out: str | Path | None = None,
) -> pd.DataFrame:
    """Score networks on held-out pairs of known ones.

    A scorer that uses labels is fitted on the training pairs of each split; the others are fitted once, on the expression of all
    cells and no label, and score all test pairs.

    Parameters
    ----------
    adata
        Cells x genes, with what the models need.
    truths
        Known networks by name: ``source``, ``target``. Candidates are BEELINE's (:func:`pertura.data.candidate_pairs`).
    models
        Scorers by name.
    splits
        Kinds of :func:`pertura.data.make_grn_splits`, and ``"all"``: every candidate, for scorers without labels.
    seeds
        Number of random splits of each kind, or their seeds.
    model_seeds
        How many times each :class:`NetworkModel` is fitted, with seeds from its own on; scores are means over the fits.
    dataset
        Name of the data in the results.
    out
        CSV file of :class:`~pertura.benchmark.Results`; what is in it is not run again. The column ``context`` is the known network.

    Returns
    -------
    One row per known network, split, seed and model: ``auprc, auprc_ratio, epr, hit_at, auroc, macro_auprc`` (ties in
    expectation), ``density``, ``n_edges``, ``seconds`` of the fit; ``model_sd``, the standard deviation of ``auprc_ratio`` over fits with
    other seeds.
    """
    _check(truths, models, splits)
    seeds = range(seeds) if isinstance(seeds, int) else seeds
    names, models = list(models), {k: m for name, model in models.items() for k, m in _fits(name, model, model_seeds)}
    results = Results(out)
    marks = {name: digest(repr(model)) for name, model in models.items()}
    took: dict[str, float] = {}
    for truth, edges in truths.items():
        for kind, seed in [(k, s) for k in splits for s in ((0,) if k == EVERYTHING else seeds)]:
            run = {"dataset": dataset, "context": truth, "split": kind, "seed": seed}
            left = [
                n
                for n, m in models.items()
                if _applies(m, kind) and not results.has({**run, "model": n}, settings=marks[n])
            ]
            if not left:
                continue
            train, test = _pairs(edges, kind, seed)
            if not test["label"].any():
                logger.warning(
                    "%s, %s, seed %d: left out, there is no known edge among the test pairs.", truth, kind, seed
                )
                continue
            for name in left:
                model = models[name]
                if model.uses_labels or name not in took:
                    with Resources() as used:
                        model.fit(adata, train if model.uses_labels else None)
                    took[name] = round(used.seconds, 2)
                rows = [{"metric": k, "value": v} for k, v in _scores(model, test).items()]
                results.add(rows, {**run, "model": name}, settings=marks[name], seconds=took[name])
            logger.info("%s, %s, seed %d: %s", truth, kind, seed, ", ".join(left))
    found = results.select(dataset=dataset, context=truths, split=splits, model=models)
    found = found[found["seed"].isin(list(seeds)) | (found["split"] == EVERYTHING)]
    return _wide(found, truths, splits, names)


def _fits(name: str, model: Scorer, n: int) -> Iterator[tuple[str, Scorer]]:
    """The model, and copies of it with the next seeds if it takes a seed."""
    yield name, model
    if isinstance(model, NetworkModel):
        for k in range(1, n):
            again = copy(model)
            again.seed = model.seed + k
            yield f"{name}{_AGAIN}{k}", again


def _check(truths: Mapping[str, pd.DataFrame], models: Mapping[str, Scorer], splits: Sequence[str]) -> None:
    unknown = [s for s in splits if s not in (EVERYTHING, *GRN_SPLITS, "edge_balanced")]
    if unknown:
        raise ValueError(f"`splits`: {unknown} are none of {(EVERYTHING, *GRN_SPLITS, 'edge_balanced')}.")
    if not truths or not models:
        raise ValueError("`truths` and `models` must name at least one network and one model.")


def _applies(model: Scorer, kind: str) -> bool:
    asked = getattr(model, "splits", None)
    return (asked is None or kind in asked) and not (model.uses_labels and kind == EVERYTHING)


def _pairs(edges: pd.DataFrame, kind: str, seed: int) -> tuple[pd.DataFrame | None, pd.DataFrame]:
    """Training pairs (`None`: there are none) and test pairs."""
    if kind == EVERYTHING:
        return None, candidate_pairs(edges)
    split = make_grn_splits(edges, kind=kind, seed=seed)[0]
    return split.train, split.test


def _scores(model: Scorer, test: pd.DataFrame) -> dict[str, float]:
    c = EdgeCandidates(test["label"], model.score(test), test["source"])
    values = {f.__name__: f(c) for f in (auprc, auprc_ratio, hit_at, auroc, macro_auprc)}
    return {**values, "epr": epr(c, ties="expected"), "density": c.density, "n_edges": int(c.label.sum())}


def _wide(found: pd.DataFrame, truths: Iterable[str], splits: Iterable[str], models: Iterable[str]) -> pd.DataFrame:
    """One row per network, split, seed and model, in the order asked for."""
    keys = ["dataset", "context", "split", "seed", "model"]
    table = found.pivot(index=[*keys, "seconds", "settings"], columns="metric", values="value").reset_index()
    table["model"] = table["model"].str.split(_AGAIN, regex=False).str[0]
    fits = table.rename_axis(columns=None).groupby(keys, sort=False)
    table = fits.agg({c: "first" if c == "settings" else "mean" for c in table if c not in keys})
    table = table.assign(model_sd=fits["auprc_ratio"].std()).reset_index()
    order = {name: i for i, name in enumerate([*truths, *splits, *models])}
    table = table.sort_values("seed", kind="stable").sort_values(
        ["context", "split", "model"], key=lambda c: c.map(order), kind="stable"
    )
    first = [
        "dataset",
        "truth",
        "split",
        "seed",
        "model",
        *_METRICS,
        "model_sd",
        "density",
        "n_edges",
        "seconds",
        "settings",
    ]
    return table.rename(columns={"context": "truth"})[first].reset_index(drop=True)


def summarize_grn(
    results: pd.DataFrame,
    *,
    reference: str = "correlation",
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """Means over splits, and how much better each model's AUPRC is than that of a reference on the same splits.

    Parameters
    ----------
    results
        What :func:`run_grn` returns.
    reference
        Model that the others are compared with.
    level, n_resamples, seed
        Level, number of samples and seed of the bootstrap over splits, the same splits for both models. Splits of one network overlap, so that intervals say whether
        a difference depends on the split, not whether it would be found with other regulators.

    Returns
    -------
    One row per network, split and model: ``auprc``, ``auprc_sd`` (over splits), the other scores, ``density``, ``n_splits``,
    ``model_sd`` where models were fitted with several seeds;
    ``gain, gain_low, gain_high``: mean AUPRC over that of the reference, minus 1.
    """
    if not 0 < level < 1:
        raise ValueError(f"`level` must lie between 0 and 1, got {level!r}.")
    lacking = sorted({"truth", "split", "seed", "model", *_METRICS} - set(results.columns))
    if lacking:
        raise ValueError(f"`results` lacks the columns {lacking}; pass what `run_grn` returns.")
    rows = []
    for (truth, split), frame in results.groupby(["truth", "split"], sort=False):
        wide = frame.pivot(index="seed", columns="model", values="auprc")
        for name, own in frame.groupby("model", sort=False):
            row = {"truth": truth, "split": split, "model": name, "n_splits": len(own)}
            row |= own.reindex(columns=[*_METRICS, "density", "seconds", "model_sd"]).mean().to_dict()
            row["auprc_sd"] = own["auprc"].std() if len(own) > 1 else np.nan
            if reference in wide and name != reference:
                row |= _gain(wide[name], wide[reference], level, n_resamples, seed)
            rows.append(row)
    table = pd.DataFrame(rows)
    first = ["truth", "split", "model", "n_splits", "density", "auprc", "auprc_sd", *_METRICS[1:]]
    last = ["gain", "gain_low", "gain_high", "seconds"]
    return table.reindex(columns=[*first, *(["model_sd"] if table["model_sd"].notna().any() else []), *last])


def _gain(own: pd.Series, other: pd.Series, level: float, n: int, seed: int) -> dict[str, float]:
    both = pd.concat([own, other], axis=1).dropna().to_numpy().T
    if not both.size:
        return {}
    gain = {"gain": _ratio(*both)}
    if both.shape[1] < 2:
        return gain
    drawn = {"paired": True, "n_resamples": n, "method": "percentile", "random_state": np.random.default_rng(seed)}
    low, high = bootstrap(tuple(both), _ratio, vectorized=True, confidence_level=level, **drawn).confidence_interval
    return {**gain, "gain_low": float(low), "gain_high": float(high)}


def _ratio(own: NDArray[np.float64], other: NDArray[np.float64], axis: int = -1) -> Any:
    return own.mean(axis) / other.mean(axis) - 1
