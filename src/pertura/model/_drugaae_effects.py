"""What DrugAAE takes from the training cells and the features of drugs: effects in closed form, and how far they are believed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy import sparse
from sklearn.utils.extmath import randomized_svd

from pertura.effects import ConditionTable, KernelFit, fit_dosed, fit_kernels
from pertura.effects._dosed import DoseEffects
from pertura.effects._kernels import correlations
from pertura.module._base import Action

from .base import PerturbationModel
from .base._predict import device_of, seeded

if TYPE_CHECKING:
    from pertura.module._drugaae import DrugAAE as Module


SIGNATURE = "signature:"
_MAX_ROWS = 5000
_SHARES = (0.0, 0.25, 0.5, 1.0)
_MIN_HELD_OUT, _MAX_HELD_OUT, _MAX_CONTROLS = 5, 40, 200


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


def gene_loadings(table: ConditionTable, n_components: int) -> NDArray[np.float64]:
    """Principal axes of what varies within conditions, a root mean square of 1 each, ``(n_genes, <= n_components)``."""
    x = table.sample.x.toarray() if sparse.issparse(table.sample.x) else table.sample.x
    left = x - table.means(table.sample.condition)
    _, values, axes = randomized_svd(left, min(n_components, *left.shape), random_state=0)
    return axes[values > 1e-6].T * table.n_genes**0.5


def blocks_of(module: Module) -> list[slice]:
    """Columns of the features that belong together: text, then each signature."""
    ends = np.cumsum([module.n_text, *map(len, module.signature_genes)])
    blocks = [slice(0, module.n_text)] if module.n_text else []
    return blocks + [slice(int(a), int(b)) for a, b in zip(ends[:-1], ends[1:], strict=True)]


@torch.no_grad()
def fit_effects(module: Module, table: ConditionTable, max_dose: Sequence[float], first: bool) -> dict[str, Any] | None:
    """Set the effects of a module in closed form, and its signatures from the training cells.

    Parameters
    ----------
    module
        Its features are set.
    table
        Training conditions.
    max_dose
        Highest registered dose of each perturbation.
    first
        Whether nothing was trained before: dose responses then start at the curve that was chosen.

    Returns
    -------
    What of the features left-out perturbations support; `None` where no trained perturbation has features.
    """
    found = fit_dosed(table, np.asarray(max_dose, dtype=np.float64))
    features = module.features.cpu().numpy().astype(np.float64)
    signatures = [genes.numpy() for genes in module.signature_genes]
    described = found.measured & (features != 0).any(1)
    fit: KernelFit | None = None
    left_out, amplitude = np.zeros(found.deviation.shape), np.tile([1.0, 0.0], (table.n_contexts, 1))
    if described.any():
        own = [np.full(module.n_text, -1)] * bool(module.n_text) + signatures
        target = found.deviation[described] + found.overall
        fit = fit_kernels(features[described], target, blocks_of(module), own=own)
        left_out[described] = fit.left_out - found.overall
        amplitude = found.amplitude(left_out)
    common = np.concatenate([found.mean, found.overall[None]])
    effects = found.effect * found.measured[:, None, None]
    scale = _signature_scale(features, module.n_text, signatures, found)
    own_signature = (found.deviation + found.overall) / scale * found.measured[:, None]
    _store(module, own_signature=np.clip(own_signature, -5.0, 5.0), signature_scale=scale)

    closed = module.closed_form
    measured = effects[found.measured].reshape(-1, module.n_genes)
    basis = _basis(np.concatenate([measured, common, left_out[described]]), closed.n_components)
    _store(closed, basis=basis, measured=found.measured, effects=effects @ basis, common=common @ basis)
    _store(closed, left_out=left_out @ basis, amplitude=np.concatenate([amplitude, amplitude.mean(0)[None]]))
    if fit is not None:
        _store(closed, weight=fit.weight @ basis, intercept=(fit.intercept - found.overall) @ basis)
        _store(closed, feature_center=fit.center, feature_block=fit.block)
    if first:
        module.start_dose_response(found.log_k, found.log_n)
    _hold_out(module, found.measured)
    if fit is None:
        return None
    return {
        "gain": fit.gain,
        "kernel_weights": tuple(map(float, fit.kernel_weights)),
        "share": fit.share,
        "gene_by_gene": fit.strength is not None,
    }


def _store(module: torch.nn.Module, **values: NDArray) -> None:
    for name, value in values.items():
        getattr(module, name).copy_(torch.as_tensor(value))


def _basis(rows: NDArray, n_components: int) -> NDArray[np.float64]:
    """Right singular vectors, padded with zeros, ``(n_genes, n_components)``."""
    basis = np.zeros((rows.shape[1], n_components))
    if n_components >= rows.shape[1]:
        np.fill_diagonal(basis, 1.0)
    elif n_components:
        _, _, v = np.linalg.svd(rows[:_MAX_ROWS], full_matrices=False)
        basis[:, : min(n_components, len(v))] = v[:n_components].T
    return basis


def _signature_scale(
    features: NDArray, n_text: int, signatures: list[NDArray], found: DoseEffects
) -> NDArray[np.float64]:
    """Root mean square of each gene in the registered signatures, or in the measured effects."""
    effects = (found.deviation + found.overall)[found.measured]
    square = (effects**2).mean(0) if len(effects) else np.ones(len(found.overall))
    if signatures:
        square, start = np.zeros(len(square)), n_text
        for genes in signatures:
            inside = genes >= 0
            square[genes[inside]] += (features[:, start : start + len(genes)][:, inside] ** 2).mean(0) / len(signatures)
            start += len(genes)
    scale = np.sqrt(square)
    return np.maximum(scale, 0.1 * np.sqrt((scale**2).mean())) + 1e-6


# -- how far the vectors of drugs are believed --------------------------------------------------------------------------


def _hold_out(module: Module, measured: NDArray[np.bool_]) -> None:
    """Keep some perturbations for choosing :attr:`vector_share`: as unmeasured ones, they do not train the vectors."""
    module.held_out.fill_(False)
    trained = np.flatnonzero(measured)
    n = min(len(trained) // 5, _MAX_HELD_OUT)
    if module.closed_form.n_components and module.features.shape[1] and n >= _MIN_HELD_OUT:
        module.held_out[torch.as_tensor(np.random.default_rng(0).permutation(trained)[:n])] = True


@torch.no_grad()
def choose_vector_share(model: PerturbationModel) -> float:
    """How much of their vectors helps with drugs that were not measured: those held out from the vectors decide."""
    module, device = model.module, device_of(model.module)
    if not module.closed_form.n_components:
        return 1.0
    held_out = torch.where(module.held_out)[0]
    query = model._registered_cells(model.train_indices)
    controls = query.rows[query.is_control]
    if not len(held_out) or not len(controls):
        return 0.0
    controls = np.sort(np.random.default_rng(0).permutation(controls)[:_MAX_CONTROLS])
    cells = next(query.at(controls).cells(len(controls), device))
    scale, embedding, n = model.registered.default_scale, module.genes(), len(cells)
    nothing = module.describe(cells.action, cells.context, embedding)
    with seeded(0, device):
        z = module.encode(cells, nothing[1], embedding).sample()

    def mean(drugs: tuple[torch.Tensor, torch.Tensor]) -> NDArray[np.float64]:
        found = module.expression(z, drugs, cells.batch, cells.library, embedding).base_dist
        return found.expectation(scale, cells.library).mean(0).double().cpu().numpy()

    start, every = mean(nothing), torch.ones_like(module.held_out)
    scores = np.zeros((len(_SHARES), len(held_out)))
    measured = (module.closed_form.effects[held_out].mean(1) @ module.closed_form.basis.mT).cpu().numpy()
    for i, share in enumerate(_SHARES):
        predicted = []
        for code in held_out:
            action = Action(code.reshape(1, 1), torch.ones(1, 1, device=device)).expand(n)
            drugs = module.describe(action, cells.context, embedding, unmeasured=every, vector_share=share)
            predicted.append(mean(drugs) - start)
        scores[i] = correlations(np.stack(predicted), measured)
    gain = scores - scores[0]
    best = int(gain.mean(1).argmax())
    clear = gain[best].mean() > gain[best].std(ddof=1) / np.sqrt(len(held_out))
    return _SHARES[best] if clear else 0.0
