"""Counterfactual draws of many cells under many perturbations, in minibatches; only summaries are kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pertura.data._constants import KEYS
from pertura.data._datamodule import Batch, CellDataset
from pertura.module._base import Action, Basal, Cells

if TYPE_CHECKING:
    from scvi.data import AnnDataManager

    from pertura.data._vocabulary import Vocabulary
    from pertura.module._base import PerturbationModule

# floats that the draws of one minibatch may hold: 64 MiB, whatever the number of cells, genes and perturbations
_BUDGET = 16 * 2**20
_TARGET_SUM = 1e4


@dataclass(frozen=True)
class Question:
    """A perturbation to predict.

    Attributes
    ----------
    label
        Canonical name.
    dose
        Dose of each member in the registered unit, empty for the control.
    """

    label: str
    dose: tuple[float, ...]

    @property
    def dose_text(self) -> str:
        """Doses as text, joined like a combination."""
        return "+".join(f"{d:g}" for d in self.dose)


@dataclass
class Draws:
    """Draws of one minibatch.

    Attributes
    ----------
    cells
        Positions of the cells in the query.
    questions
        Positions of the perturbations.
    expression
        ``(n_samples, n_questions, n_cells, n_genes)`` on the asked scale.
    latent
        Perturbed state, ``(n_samples, n_questions, n_cells, n_latent)``.
    basal
        Basal state, ``(n_samples, n_cells, n_latent)``.
    context
        Codes, ``(n_cells,)``.
    """

    cells: np.ndarray
    questions: np.ndarray
    expression: Tensor
    latent: Tensor
    basal: Tensor
    context: np.ndarray


def actions(vocabulary: Vocabulary, questions: Sequence[Question], device: torch.device) -> Action:
    """Codes, relative doses and features of the questions, one row each."""
    members = [vocabulary.parse(q.label) for q in questions]
    order = max([1, *(len(m) for m in members)])
    codes = np.stack([vocabulary.code(m, order) for m in members])
    dose = np.zeros(codes.shape, dtype=np.float32)
    unit = np.append(vocabulary.max_dose, [1.0, 1.0])
    for row, question in enumerate(questions):
        n = len(question.dose)
        dose[row, :n] = np.asarray(question.dose) / unit[codes[row, :n]]
    features = None
    if vocabulary.features is not None:
        names = [name for m in members for name in [*m, *[""] * (order - len(m))]]
        features = torch.as_tensor(vocabulary.feature_matrix(names)).reshape(len(questions), order, -1)
    return Action(torch.as_tensor(codes), torch.as_tensor(dose), features).to(device)


def draw(
    module: PerturbationModule,
    manager: AnnDataManager,
    rows: np.ndarray,
    questions: Sequence[Question],
    vocabulary: Vocabulary,
    *,
    n_samples: int,
    scale: str,
    seed: int,
    globals_: dict[str, Tensor],
    batch_size: int | None = None,
    size_factors: bool = False,
) -> Iterator[Draws]:
    """Yield draws of all cells under all perturbations, minibatch by minibatch.

    Basal states and measurement noise of a cell are drawn once and serve every perturbation (common random numbers). The
    global random state is left as it was.

    Parameters
    ----------
    module, manager
        What predicts, and the registered query.
    rows
        Cells of the query.
    questions
        Perturbations.
    n_samples
        Draws per cell.
    scale
        ``"log1p"``, ``"counts"`` or ``"layer"``.
    seed
        Of all draws.
    globals_
        Draws of global parameters.
    batch_size
        Cells per minibatch; by default what the memory budget allows.
    size_factors
        Whether ``"log1p"`` divides by registered size factors instead of drawn totals.
    """
    device = next(iter(module.state_dict().values())).device
    dataset = CellDataset(manager)
    n_genes = manager.adata.n_vars
    fit = max(1, _BUDGET // (n_samples * n_genes))
    batch_size = min(batch_size or 1024, fit)
    per_chunk = max(1, fit // batch_size)
    for start in range(0, len(rows), batch_size):
        positions = np.arange(start, min(start + batch_size, len(rows)))
        tensors = dataset[Batch(rows[positions], 0)]
        tensors.pop("n_pairs")
        cells = Cells.from_tensors({k: v.to(device) for k, v in tensors.items()})
        with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed + start)
            basal = module.abduct(cells, n_samples, globals_)
            noise_seed = int(torch.randint(2**31, ()).item())
            for first in range(0, len(questions), per_chunk):
                chunk = np.arange(first, min(first + per_chunk, len(questions)))
                action = actions(vocabulary, [questions[i] for i in chunk], device)
                # the same measurement noise whatever is asked beside it
                torch.manual_seed(noise_seed)
                expression, latent = _predict(module, basal, action, len(cells), globals_)
                library = cells.library if size_factors else None
                yield Draws(
                    cells=positions,
                    questions=chunk,
                    expression=rescale(expression, module.native_scale, scale, cells.library, library),
                    latent=latent,
                    basal=basal.z,
                    context=tensors[KEYS.CONTEXT].long().flatten().numpy(),
                )


def _predict(
    module: PerturbationModule, basal: Basal, action: Action, n_cells: int, globals_: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    n = len(action.codes)
    many = basal.repeat(n)
    each = Action(
        action.codes.repeat_interleave(n_cells, 0),
        action.dose.repeat_interleave(n_cells, 0),
        None if action.features is None else action.features.repeat_interleave(n_cells, 0),
    )
    z = module.act(many, each, globals_)
    x = module.decode(z, many)
    return x.unflatten(1, (n, n_cells)), z.unflatten(1, (n, n_cells))


def rescale(x: Tensor, native: str, wanted: str, library: Tensor, size_factor: Tensor | None) -> Tensor:
    """Draws on another scale; the last two dimensions are cells and genes."""
    if native == wanted or native == "layer":
        return x
    if native == "counts" and wanted == "log1p":
        total = x.sum(-1, keepdim=True).clamp(min=1.0) if size_factor is None else size_factor
        return torch.log1p(x * (_TARGET_SUM / total))
    if native == "log1p" and wanted == "counts":
        return torch.expm1(x.clamp(min=0.0)) * library / _TARGET_SUM
    return x
