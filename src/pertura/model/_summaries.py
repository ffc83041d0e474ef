"""What is kept of the draws: means, intervals and effects."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy import stats
from scvi.data import AnnDataManager
from torch import Tensor

from ._discrepancy import Discrepancy, widened
from ._effects import EffectSums, effect_table
from ._engine import Block, Engine, Question, quantiles, rescale
from ._query import QueryMixin


@dataclass
class Predicted:
    """Summaries of some cells.

    Attributes
    ----------
    mean, low, high
        Mean and interval of expression, ``(n_questions, n_cells, n_genes)``; the ends may be `None`.
    latent
        Mean latent state under each perturbation, ``(n_questions, n_cells, n_latent)``.
    basal
        Mean basal state, ``(1, n_cells, n_latent)``.
    """

    mean: NDArray[np.float32]
    low: NDArray[np.float32] | None
    high: NDArray[np.float32] | None
    latent: NDArray[np.float32]
    basal: NDArray[np.float32]

    def items(self) -> list[tuple[str, NDArray[np.float32]]]:
        """Arrays that are there, by name."""
        named = [(f.name, getattr(self, f.name)) for f in fields(self)]
        return [(name, array) for name, array in named if array is not None]

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        return self.mean.shape[1]

    @classmethod
    def concatenate(cls, parts: Sequence[Predicted]) -> Predicted:
        """Cells of several, one after the other."""
        names = [name for name, _ in parts[0].items()]
        joined = {name: np.concatenate([getattr(p, name) for p in parts], axis=1) for name in names}
        return cls(**{f.name: joined.get(f.name) for f in fields(cls)})

    def take(self, cells: slice) -> Predicted:
        """Some of the cells."""
        return Predicted(
            **{f.name: None for f in fields(self)} | {name: array[:, cells] for name, array in self.items()}
        )


class SummaryMixin(QueryMixin):
    """One pass over cells and perturbations."""

    calibration_: dict[str, Any] | None
    contexts: list[str]

    @property
    def _discrepancy(self) -> Discrepancy:
        """How far effects are from the truth."""
        return Discrepancy(self.calibration_, self.vocabulary, self.contexts)

    def _engine(self, manager: AnnDataManager, **options: Any) -> Engine:
        globals_ = self._globals(manager, options["n_samples"], options["seed"])
        return Engine(self.module, manager, self.vocabulary, globals_=globals_, **options)

    def _predict_blocks(
        self,
        manager: AnnDataManager,
        rows: NDArray[np.int64],
        questions: Sequence[Question],
        *,
        ci: float | None,
        effects: EffectSums | None = None,
        **options: Any,
    ) -> Iterator[Predicted]:
        """Summaries of the given cells, block by block; on the way `effects` is filled."""
        counted = np.isin(rows, self._controls_or_all(manager, rows)) if effects is not None else None
        widening = None if ci is None else _Widening(self, manager, rows, questions, options["scale"], ci)
        for block in self._engine(manager, **options).blocks(rows):
            own = own_mean = None
            if effects is not None or (widening is not None and widening.needed):
                own = block.ask(None)[0]
                own_mean = own.mean(0)
            if effects is not None:
                weights = self._add_control(effects, block, own, counted[block.positions])
            del own
            parts: dict[str, list[Tensor]] = {"mean": [], "low": [], "high": [], "latent": []}
            for q, question in enumerate(questions):
                x, z = block.ask(question)
                mean = x.mean(0)
                parts["mean"].append(mean)
                parts["latent"].append(z.mean(0))
                if effects is not None:
                    effects.add(q, weights, x)
                if widening is not None:
                    low, high = quantiles(x, ((1 - ci) / 2, (1 + ci) / 2))
                    if own_mean is not None:
                        low, high = widened(mean, low, high, widening.half_width(q, block, mean, own_mean))
                    # counts and their logarithms are never negative
                    parts["low"].append(low.clamp(min=0.0) if self.data_kind == "counts" else low)
                    parts["high"].append(high)
            arrays = {k: torch.stack(v).cpu().numpy() if v else None for k, v in parts.items()}
            yield Predicted(**arrays, basal=block.basal.z.mean(0, keepdim=True).cpu().numpy())

    def _add_control(self, effects: EffectSums, block: Block, own: Tensor, counted: NDArray[np.bool_]) -> Tensor:
        weights = effects.weights(block.context, counted, own)
        effects.add_cells(weights, block.cells.library)
        treated = block.cells.action.present.any(1)
        # in contexts without controls, cells are compared with themselves had nothing been done to them
        if bool((treated & weights.any(0)).any()):
            own = block.ask(Question(self.vocabulary.control))[0]
        effects.add_control(weights, own)
        return weights

    def _predict_cells(
        self,
        manager: AnnDataManager,
        rows: NDArray[np.int64],
        questions: Sequence[Question],
        **options: Any,
    ) -> Predicted:
        """Summaries of all given cells at once."""
        result: Predicted | None = None
        start = 0
        for part in self._predict_blocks(manager, rows, questions, **options):
            if result is None:
                empty = {
                    name: np.empty((len(array), len(rows), array.shape[2]), np.float32) for name, array in part.items()
                }
                result = Predicted(**{f.name: empty.get(f.name) for f in fields(Predicted)})
            stop = start + part.n_cells
            for name, array in part.items():
                getattr(result, name)[:, start:stop] = array
            start = stop
        return result

    # -- effects ----------------------------------------------------------------------------------------------------

    def _effect_sums(
        self, manager: AnnDataManager, rows: NDArray[np.int64], n_questions: int, n_samples: int
    ) -> EffectSums:
        present = np.unique(self._contexts_of(manager, rows))
        return EffectSums(n_questions, n_samples, len(self.gene_names), present)

    def _effect_table(
        self,
        manager: AnnDataManager,
        sums: EffectSums,
        questions: Sequence[Question],
        *,
        ci: float,
        delta: float,
        scale: str,
    ) -> pd.DataFrame:
        return effect_table(
            sums,
            questions,
            contexts=self._context_names(manager),
            genes=self.gene_names,
            discrepancy=self._discrepancy,
            has_dose=self.vocabulary.has_dose,
            ci=ci,
            delta=delta,
            scale=scale,
        )

    def _effects_of(
        self,
        manager: AnnDataManager,
        rows: NDArray[np.int64],
        questions: Sequence[Question],
        *,
        ci: float,
        delta: float,
        **options: Any,
    ) -> pd.DataFrame:
        """Effect table of some cells, in as many passes as memory asks for."""
        n_samples, n_contexts = options["n_samples"], len(np.unique(self._contexts_of(manager, rows)))
        step = EffectSums.questions_per_pass(n_samples, len(self.gene_names), n_contexts)
        counted = np.ones(len(rows), dtype=bool)
        tables = []
        for first in range(0, len(questions), step):
            part = questions[first : first + step]
            sums = self._effect_sums(manager, rows, len(part), n_samples)
            for block in self._engine(manager, **options).blocks(rows):
                weights = self._add_control(sums, block, block.ask(None)[0], counted[block.positions])
                for q, question in enumerate(part):
                    sums.add(q, weights, block.ask(question)[0])
            tables.append(self._effect_table(manager, sums, part, ci=ci, delta=delta, scale=options["scale"]))
        return pd.concat(tables, ignore_index=True)

    # -- what calibration asks --------------------------------------------------------------------------------------

    def _mean_effects(
        self, rows: NDArray[np.int64], questions: Sequence[Question], scale: str, seed: int
    ) -> NDArray[np.float64]:
        """Predicted effects on the mean of the given own control cells, ``(n_questions, n_genes)``."""
        total = np.zeros((len(questions), len(self.gene_names)))
        engine = self._engine(self.adata_manager, n_samples=10, scale=scale, seed=seed)
        for block in engine.blocks(rows):
            own = block.ask(None)[0].mean(0)
            for q, question in enumerate(questions):
                total[q] += (block.ask(question)[0].mean(0) - own).sum(0).cpu().numpy()
        return total / len(rows)

    def _moments(self, rows: NDArray[np.int64], scale: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Mean of own cells on a scale, and the squared standard error of that mean."""
        native = "counts" if self.data_kind == "counts" else "layer"
        sized = self._argument("size_factor_key") is not None
        total = square = 0.0
        for cells in self._cells(self.adata_manager, rows, 512):
            x = rescale(cells.x, native, scale, cells.library, cells.library if sized else None)
            x = x.cpu().double()
            total, square = total + x.sum(0), square + (x**2).sum(0)
        n = len(rows)
        mean = total / n
        variance = (square / n - mean**2).clamp(min=0.0) / max(n - 1, 1)
        return mean.numpy(), variance.numpy()


class _Widening:
    """What the discrepancy adds to the intervals of cells.

    It is in proportion to how far a prediction is from the cell's own state, which was measured: nothing is added where
    the cell's own perturbation is asked.
    """

    def __init__(
        self,
        model: SummaryMixin,
        manager: AnnDataManager,
        rows: NDArray[np.int64],
        questions: Sequence[Question],
        scale: str,
        ci: float,
    ) -> None:
        self.discrepancy, self.scale = model._discrepancy, scale
        self.z = float(stats.norm.ppf((1 + ci) / 2))
        names = model._context_names(manager)
        self._asked = self.discrepancy.table(questions, names)
        own, self._which = model._done(manager, rows)
        self._own = self.discrepancy.table(own, names)
        self._same = np.array([[_alike(q, o) for o in own] for q in questions])
        # whether anything is added to some cell
        self.needed = bool(self._asked.any() or self._own.any() or np.any(self.discrepancy.noise))

    def half_width(self, question: int, block: Block, mean: Tensor, own: Tensor) -> Tensor:
        """Half-widths to add, ``(n_cells, n_genes)``.

        Parameters
        ----------
        mean, own
            Mean expression under the question and under the cells' own perturbation, ``(n_cells, n_genes)``.
        """
        which = self._which[block.positions]
        asked, done = self._asked[question, block.context], self._own[which, block.context]
        changed = ~self._same[question, which]
        a2 = ((asked[:, 0] ** 2 + done[:, 0] ** 2)[:, None] + self.discrepancy.noise) * changed[:, None]
        k = (np.maximum(asked[:, 1], done[:, 1]) * changed)[:, None]
        a2, k = (torch.as_tensor(v, dtype=mean.dtype, device=mean.device) for v in (a2, k))
        unit = self.discrepancy.unit(self.scale, own, block.cells.library)
        return self.z * (a2 * unit**2 + (k * (mean - own)) ** 2).sqrt()


def _alike(one: Question, other: Question) -> bool:
    return one.label == other.label and np.allclose(one.dose, other.dose, rtol=1e-4, atol=0.0)
