"""What is known of perturbations: features and their kinds, effects in closed form, embeddings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from pertura.baseline._pseudobulk import Pseudobulk
from pertura.nn._ridge import fit_descriptions

from ._arguments import check_whole
from ._engine import Question
from ._targets import TargetMixin

if TYPE_CHECKING:
    from pertura.module._drugaae import DrugAAE as Module

SIGNATURE = "signature:"
_GRID_K, _GRID_N = (-1.5, -0.75, 0.0, 0.75), (-0.5, 0.0, 0.5)


def order_features(features: pd.DataFrame | None) -> pd.DataFrame | None:
    """Columns of text first, then signature by signature."""
    if features is None:
        return None
    names = features.columns.astype(str)
    kind = [name.rsplit(":", 1)[0] if name.startswith(SIGNATURE) else "" for name in names]
    order = np.argsort(pd.factorize(pd.Series(kind), sort=True)[0], kind="stable")
    return features.iloc[:, order]


def split_columns(features: pd.DataFrame | None, genes: pd.Index) -> tuple[list[str], dict[str, NDArray[np.int64]]]:
    """Columns of text, and for each signature the genes of its columns (-1: not among `genes`)."""
    if features is None:
        return [], {}
    names = features.columns.astype(str)
    text = [n for n in names if not n.startswith(SIGNATURE)]
    table = pd.DataFrame([n.rsplit(":", 1) for n in names if n.startswith(SIGNATURE)], columns=["name", "gene"])
    found = {str(n): genes.get_indexer(own["gene"]) for n, own in table.groupby("name", sort=False)}
    return text, found


def hill(dose: NDArray, log_k: float, log_n: float) -> NDArray[np.float64]:
    """As :func:`pertura.module._drugaae.hill`."""
    k, power = np.exp(log_k) ** np.exp(log_n), np.maximum(dose, 0.0) ** np.exp(log_n)
    return power * (1.0 + k) / (power + k)


def solve_effects(
    design: NDArray, measured: NDArray, variance: NDArray
) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
    """Effects at the highest dose and their mean: normal, shrunk towards the mean by what noise there is.

    Parameters
    ----------
    design
        Dose response of each perturbation in each condition, ``(n_conditions, n_perturbations)``.
    measured, variance
        Effects of the conditions and their squared standard errors, ``(n_conditions, n_genes)``.

    Returns
    -------
    Effects ``(n_perturbations, n_genes)``, mean ``(n_genes,)``, and the weighted squared residual.
    """
    noise = variance.mean(1)
    noise = noise + 0.05 * measured.var() + 1e-8
    total = design.sum(1)
    mean = ((total / noise) @ measured) / max(float(total**2 @ (1 / noise)), 1e-12)
    rest = measured - total[:, None] * mean
    signal = max(float((rest**2).mean() - variance.mean()), 0.05 * float((measured**2).mean())) + 1e-8
    gram = (design.T / noise) @ design + np.eye(design.shape[1]) / signal
    effects = mean + np.linalg.solve(gram, (design.T / noise) @ rest)
    return effects, mean, float((((measured - design @ effects) ** 2).sum(1) / noise).sum())


def fit_effects(
    bulk: Pseudobulk,
    max_dose: NDArray[np.float64],
    n_contexts: int,
    features: NDArray,
    *,
    n_text: int,
    signatures: list[NDArray],
    n_components: int,
) -> dict[str, Any]:
    """Effects of trained perturbations, and of others from their features, as coordinates in a basis.

    Returns
    -------
    Buffers of :class:`pertura.module.DrugAAE` by name, and ``summary``: what of the descriptions was believed.
    """
    n, n_genes, n_perturbations = len(bulk.context), bulk.mean.shape[1], len(max_dose)
    measured = bulk.mean[:n].astype(np.float64) - bulk.mean[n:][bulk.context]
    variance = (bulk.variance[:n] + bulk.variance[n:][bulk.context]).astype(np.float64)
    present = bulk.codes >= 0
    relative = bulk.dose / max_dose[np.maximum(bulk.codes, 0)]

    def solve(log_k: float, log_n: float) -> tuple[dict[int, tuple], float]:
        strength = hill(relative, log_k, log_n) * present
        design = np.zeros((n, n_perturbations))
        np.add.at(design, (np.arange(n)[:, None], np.maximum(bulk.codes, 0)), strength)
        result, loss = {}, 0.0
        for context in np.unique(bulk.context):
            own = bulk.context == context
            seen = np.flatnonzero((design[own] > 0).any(0))
            effects, mean, residual = solve_effects(design[own][:, seen], measured[own], variance[own])
            result[int(context)] = (seen, effects, mean)
            loss += residual
        return result, loss

    curves = [(0.0, 0.0)]
    if len(np.unique(relative[present].round(6))) > 1:
        curves = [(k, s) for k in _GRID_K for s in _GRID_N]
    solved = {curve: solve(*curve) for curve in curves} if n_perturbations <= 500 else {(0.0, 0.0): solve(0.0, 0.0)}
    curve = min(solved, key=lambda c: solved[c][1])
    by_context = solved[curve][0]

    overall = np.mean([mean for _, _, mean in by_context.values()], axis=0)
    total, number = np.zeros((n_perturbations, n_genes)), np.zeros(n_perturbations)
    for seen, effects, mean in by_context.values():
        total[seen] += effects - mean
        number[seen] += 1
    observed = number > 0
    deviation = total / np.maximum(number, 1)[:, None]
    described = observed & (features != 0).any(1) if features.shape[1] else np.zeros(n_perturbations, dtype=bool)
    blocks = _blocks(n_text, signatures)
    own = [np.full(n_text, -1)] * bool(n_text) + list(signatures)
    fit = (
        fit_descriptions(features[described].astype(np.float64), deviation[described] + overall, blocks, own=own)
        if described.any()
        else None
    )
    left_out = np.zeros((n_perturbations, n_genes))
    if fit is not None:
        left_out[described] = fit.left_out - overall

    table = np.zeros((n_perturbations, n_contexts, n_genes), dtype=np.float32)
    common = np.tile(overall, (n_contexts + 1, 1))
    for context, (seen, effects, mean) in by_context.items():
        table[:, context] = mean + deviation
        table[seen, context] = effects
        common[context] = mean
    others = [c for c in range(n_contexts) if c not in by_context]
    table[:, others] = (overall + deviation)[:, None]
    basis = _basis(np.concatenate([table[observed].reshape(-1, n_genes), common, left_out[described]]), n_components)
    scale = _signature_scale(features, n_text, signatures, deviation[observed] + overall)
    return {
        "observed": observed,
        "own_signature": np.clip((deviation + overall) * observed[:, None] / scale, -5.0, 5.0),
        "signature_scale": scale,
        "basis": basis,
        "effects": table @ basis,
        "left_out": left_out @ basis,
        "common": common @ basis,
        "from_features": np.zeros((features.shape[1], n_components)) if fit is None else fit.weight @ basis,
        "from_nothing": np.zeros(n_components) if fit is None else (fit.intercept - overall) @ basis,
        "dose": np.arctanh(np.array([curve[0] / 2.0, curve[1]]) * 0.999),
        "summary": None
        if fit is None
        else {
            "gain": fit.gain,
            "penalty": float(fit.penalty),
            "mixture": tuple(map(float, fit.mixture)),
            "share": fit.share,
            "gene_by_gene": fit.strength is not None,
        },
    }


def _blocks(n_text: int, signatures: list[NDArray]) -> list[slice]:
    ends = np.cumsum([n_text, *map(len, signatures)])
    blocks = [slice(0, n_text)] if n_text else []
    return blocks + [slice(int(a), int(b)) for a, b in zip(ends[:-1], ends[1:], strict=True)]


def _basis(rows: NDArray, n_components: int) -> NDArray[np.float32]:
    """Right singular vectors, padded with zeros, ``(n_genes, n_components)``."""
    basis = np.zeros((rows.shape[1], n_components), dtype=np.float32)
    if n_components >= rows.shape[1]:
        np.fill_diagonal(basis, 1.0)
        return basis
    if n_components:
        _, _, v = np.linalg.svd(rows[:5000].astype(np.float64), full_matrices=False)
        basis[:, : min(n_components, len(v))] = v[:n_components].T
    return basis


def _signature_scale(
    features: NDArray, n_text: int, signatures: list[NDArray], effects: NDArray
) -> NDArray[np.float64]:
    """Root mean square of each gene in the registered signatures, or in the measured effects."""
    square = (effects**2).mean(0)
    if signatures:
        square, start = np.zeros(effects.shape[1]), n_text
        for genes in signatures:
            inside = genes >= 0
            square[genes[inside]] += (features[:, start : start + len(genes)][:, inside] ** 2).mean(0) / len(signatures)
            start += len(genes)
    scale = np.sqrt(square)
    return np.maximum(scale, 0.1 * np.sqrt((scale**2).mean())) + 1e-6


class DescriptionMixin(TargetMixin):
    """What a model that reads descriptions can say of perturbations and genes."""

    module: Module
    description_: dict[str, Any] | None

    def get_drug_embedding(self) -> pd.DataFrame:
        """Vectors v of trained perturbations and of all others that are described.

        Returns
        -------
        DataFrame indexed by perturbation, ``(n_perturbations, n_latent)``; column ``trained`` last.
        """
        self._check_if_trained(warn=False, message="The model is not trained. Call `train()` first.")
        names, features, own = self._described()
        with torch.no_grad():
            v = self.module.vector(features, own, self.module.genes())
        table = pd.DataFrame(v.cpu().numpy(), index=pd.Index(names, name="perturbation"))
        table.columns = [f"v{i + 1}" for i in range(table.shape[1])]
        observed = {n for n, o in zip(self.vocabulary.names, self.module.observed.tolist(), strict=True) if o}
        table["trained"] = [n in observed for n in names]
        return table

    def _described(self) -> tuple[list[str], torch.Tensor, torch.Tensor | None]:
        """Names, features and own signatures of trained and of described perturbations."""
        module, vocabulary = self.module, self.vocabulary
        names = list(vocabulary.names)
        if vocabulary.features is not None:
            names += [str(n) for n in vocabulary.features.index if n not in set(names)]
            features = torch.as_tensor(vocabulary.feature_matrix(names))
        else:
            features = torch.zeros(len(names), 0)
        features = features.to(module.features.device)
        if module.signature_genes:
            return names, features, None
        own = features.new_zeros(len(names), module.n_genes)
        own[: len(vocabulary.names)] = module.own_signature
        return names, features, own

    def get_gene_embedding(self) -> pd.DataFrame:
        """Embedding E of genes, ``(n_genes, n_gene_embedding)``, indexed by gene."""
        with torch.no_grad():
            return pd.DataFrame(self.module.genes().cpu().numpy(), index=pd.Index(self.gene_names, name="gene"))

    def get_reliability(self, perturbation: str, *, n_neighbors: int = 3) -> pd.DataFrame:
        """Trained perturbations whose descriptions are nearest to that of a perturbation.

        Parameters
        ----------
        perturbation
            A single perturbation, trained or described.
        n_neighbors
            How many to name.

        Returns
        -------
        DataFrame with ``neighbor`` and ``similarity`` (cosine of the features, each kind scaled as a whole, of the measured
        effects where there are no features), and in ``attrs``: ``reliability``, the highest similarity (at least 0) times the
        share of descriptions that trained perturbations, left out one at a time, bore out (1 where effects were measured), and
        ``gain``, by how much descriptions then improved the correlation over the mean effect.
        """
        check_whole("n_neighbors", n_neighbors)
        self._check_if_trained(warn=False, message="The model is not trained. Call `train()` first.")
        self._check_representable(perturbation)
        names, unit = self._unit_descriptions()
        if perturbation not in names:
            raise ValueError(f"`perturbation`: {perturbation!r} is not a single perturbation. Ask for its members.")
        at = names.index(perturbation)
        similarity = unit @ unit[at]
        trained = np.flatnonzero(self.module.observed.cpu().numpy())
        trained = trained[trained != at]
        order = trained[np.argsort(-similarity[trained], kind="stable")][:n_neighbors]
        table = pd.DataFrame({"neighbor": [names[i] for i in order], "similarity": similarity[order]})
        measured = at < len(self.vocabulary.names) and bool(self.module.observed[at])
        summary = self.description_ or {"share": 0.0, "gain": 0.0}
        top = float(max(similarity[order].max(initial=0.0), 0.0))
        table.attrs = {"reliability": 1.0 if measured else top * summary["share"], "gain": summary["gain"]}
        return table

    def _unit_descriptions(self) -> tuple[list[str], NDArray[np.float64]]:
        """Names, and descriptions of length 1, each kind scaled as a whole; measured effects where there are no features."""
        names, features, own = self._described()
        values = own if not features.shape[1] else features
        values = values.cpu().numpy().astype(np.float64)
        if features.shape[1]:
            blocks = _blocks(self.module.n_text, [g.numpy() for g in self.module.signature_genes])
            parts = [values[:, b] / (np.sqrt((values[:, b] ** 2).sum(1).mean()) + 1e-12) for b in blocks]
            values = np.concatenate(parts, axis=1)
        return names, values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12)

    def _asked(self, questions: list[Question], ci: float | None, options: dict[str, Any]) -> dict[str, Any]:
        """Provenance of a result, with the reliability of each single perturbation (NaN for combinations)."""
        found = super()._asked(questions, ci, options)
        control = self.vocabulary.control
        single = [q.label != control and len(self.vocabulary.parse(q.label)) == 1 for q in questions]
        found["reliability"] = [
            self.get_reliability(q.label).attrs["reliability"] if one else float("nan")
            for q, one in zip(questions, single, strict=True)
        ]
        return found
