"""Counterfactuals of many cells under many perturbations, block by block; what is kept of them are summaries."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from pertura.data._cells import Batch
from pertura.data._constants import DOSE_TOLERANCE, KEYS
from pertura.data._perturbation import Perturbation, encode
from pertura.data._vocabulary import Vocabulary
from pertura.effects._discrepancy import Discrepancy, widened
from pertura.module._base import Action, Basal, Cells, Counterfactual, PerturbationModule
from pertura.nn._likelihoods import Point

from ._effects import EffectSums
from ._query import Query

TARGET_SUM = 1e4
# Numbers in one array of draws (32 MiB), and cells of a block. Blocks depend on cells, genes and draws alone, so that a
# seed gives the same draws whatever is asked at once and however the data are read.
_BUDGET, _MAX_CELLS = 2**23, 256


@dataclass(frozen=True)
class Settings:
    """How to predict.

    Attributes
    ----------
    n_samples
        Draws per cell.
    scale
        ``"log1p"``, ``"counts"`` or ``"layer"``.
    seed
        Of all draws. The global random state stays as it is.
    batch_size
        Cells read at a time, rounded to blocks; no result depends on it.
    noise
        ``"own"``: each cell keeps the noise of its own measurement; ``"none"``: expectations given the latent state.
    changes
        Fields of :class:`~pertura.module.Cells` that are exchanged beside the perturbation, such as ``{"qc": 0.0}``.
    """

    n_samples: int
    scale: str
    seed: int
    batch_size: int | None = None
    noise: str = "own"
    changes: dict[str, float] = field(default_factory=dict)


@contextmanager
def seeded(seed: int | Sequence[int], device: torch.device) -> Iterator[None]:
    """Seed the draws of one device, and leave all random states as they were.

    :func:`torch.manual_seed` would seed every device and restore none.
    """
    number = int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> 1)
    backend = {"cuda": torch.cuda, "mps": torch.mps}.get(device.type)
    where = (device,) if device.type == "cuda" else ()
    state, own = torch.get_rng_state(), None if backend is None else backend.get_rng_state(*where)
    try:
        torch.default_generator.manual_seed(number)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(number)
        elif backend is not None:
            backend.manual_seed(number)
        yield
    finally:
        torch.set_rng_state(state)
        if backend is not None:
            backend.set_rng_state(own, *where)


def device_of(module: torch.nn.Module) -> torch.device:
    """Where a module's parameters and buffers are."""
    return next((value.device for value in module.state_dict().values()), torch.device("cpu"))


def rescale(x: Tensor, native: str, wanted: str, library: Tensor) -> Tensor:
    """Values on another scale; the last two dimensions are cells and genes, `library` is ``(n_cells, 1)``."""
    if native in (wanted, "layer"):
        return x
    if native == "counts" and wanted == "log1p":
        return torch.log1p(x * (TARGET_SUM / library))
    if native == "log1p" and wanted == "counts":
        return torch.expm1(x.clamp(min=0.0)) * (library / TARGET_SUM)
    raise ValueError(f"There is no way from the scale {native!r} to {wanted!r}.")


class Block:
    """Some cells whose basal states were inferred: predicted under any number of perturbations.

    Basal states and measurement noise serve every perturbation (common random numbers), so that the difference between
    two predictions is an effect and not noise, and does not depend on what else is predicted.

    Attributes
    ----------
    positions
        Positions of the cells among those asked.
    cells
        Their measurements.
    context
        Codes of their contexts, ``(n_cells,)``.
    basal
        Draws of their basal states and noise.
    """

    def __init__(self, predictor: Predictor, positions: NDArray[np.int64], tensors: dict[str, Tensor]) -> None:
        self._predictor = predictor
        self._index = int(positions[0]) // predictor.block_size
        self.positions = positions
        self.context: NDArray[np.int64] = tensors[KEYS.CONTEXT].long().flatten().numpy()
        self.cells = Cells.from_tensors({k: v.to(predictor.device) for k, v in tensors.items()})
        with self._seeded(0):
            self.basal: Basal = predictor.module.abduct(self.cells, predictor.settings.n_samples, predictor.globals)

    def __len__(self) -> int:
        return len(self.positions)

    def _seeded(self, purpose: int) -> Any:
        return _no_grad_seeded([self._predictor.settings.seed, self._index, purpose], self._predictor.device)

    def under(self, perturbation: Perturbation | None) -> Counterfactual:
        """The cells under a perturbation; `None`: under their own."""
        predictor = self._predictor
        action = self.cells.action if perturbation is None else predictor.action(perturbation).expand(len(self))
        basal = self.basal
        if predictor.settings.changes:
            changed = {
                name: None if getattr(basal.cells, name) is None else torch.full_like(getattr(basal.cells, name), value)
                for name, value in predictor.settings.changes.items()
            }
            basal = replace(basal, cells=replace(basal.cells, **changed))
        with self._seeded(1):
            return predictor.module.counterfactual(basal, action)

    def basal_state(self) -> Tensor:
        """Draws of the basal states, with what else is exchanged."""
        predictor = self._predictor
        if not predictor.settings.changes:
            return self.basal.state
        return self.under(Perturbation(predictor.vocabulary.control)).state

    def mean(self, found: Counterfactual) -> Tensor:
        """Mean expression on the asked scale for each draw of latent variables, ``(n_samples, n_cells, n_genes)``."""
        settings, expression = self._predictor.settings, found.expression
        with torch.no_grad():
            if settings.noise == "none":
                return expression.expectation(settings.scale, self.cells.library)
            return expression.conditional_mean(self.basal.noise, settings.scale, self.cells.library)

    def draws(self, found: Counterfactual) -> Tensor:
        """Draws of expression on the asked scale, ``(n_samples, n_cells, n_genes)``."""
        predictor = self._predictor
        if isinstance(found.expression, Point):  # known without noise: nothing is left to draw
            return self.mean(found)
        with self._seeded(2):
            noise = self.basal.noise if predictor.settings.noise == "own" else None
            x = found.of_cells.sample() if noise is None else found.of_cells.replay(noise)
        return rescale(x, predictor.module.native_scale, predictor.settings.scale, self.cells.library)

    def own(self) -> Tensor:
        """The cells' own expression as measured, on the asked scale, ``(n_cells, n_genes)``."""
        native = predictor_native(self._predictor.module)
        return rescale(self.cells.x, native, self._predictor.settings.scale, self.cells.library)

    def replicate(self) -> Tensor:
        """Expression under the cells' own perturbation, measured anew, on the native scale."""
        found = self.under(None)
        with self._seeded(3):
            return found.of_cells.sample()


@contextmanager
def _no_grad_seeded(seed: Sequence[int], device: torch.device) -> Iterator[None]:
    with torch.no_grad(), seeded(seed, device):
        yield


def predictor_native(module: PerturbationModule) -> str:
    """Scale on which cells are registered: a module on ``"log1p"`` reads counts."""
    return "layer" if module.native_scale == "layer" else "counts"


class Predictor:
    """Runs a module on cells.

    Parameters
    ----------
    module
        What predicts.
    query
        Cells.
    vocabulary
        What perturbations are called.
    settings
        How.
    extra
        What the model learned from the query, for the module, beside the draws of global parameters.
    """

    def __init__(
        self,
        module: PerturbationModule,
        query: Query,
        vocabulary: Vocabulary,
        settings: Settings,
        extra: dict[str, Any] | None = None,
    ) -> None:
        self.module, self.query, self.vocabulary, self.settings = module, query, vocabulary, settings
        self.device = device_of(module)
        module.eval()
        first = next(query.at(query.rows[:1]).cells(1, self.device))
        with _no_grad_seeded([settings.seed], self.device):
            self.globals = {**module.draw_globals(settings.n_samples, first), **(extra or {})}
        self.block_size = int(np.clip(_BUDGET // (settings.n_samples * query.dataset.n_genes), 1, _MAX_CELLS))
        self._read = max(1, (settings.batch_size or 1) // self.block_size) * self.block_size
        self._actions: dict[Perturbation, Action] = {}

    def blocks(self, first_cell: int = 0) -> Iterator[Block]:
        """The cells, block by block, from one that begins a block."""
        rows = self.query.rows
        for start in range(first_cell, len(rows), self._read):
            tensors = self.query.dataset[Batch(rows[start : start + self._read], 0)]
            tensors.pop("n_pairs")
            n_read = len(tensors[KEYS.X])
            for first in range(0, n_read, self.block_size):
                part = slice(first, min(first + self.block_size, n_read))
                positions = np.arange(start + part.start, start + part.stop)
                yield Block(self, positions, {k: v[part] for k, v in tensors.items()})

    def action(self, perturbation: Perturbation) -> Action:
        """A perturbation as modules read it, one row."""
        if perturbation not in self._actions:
            parts = encode(self.vocabulary, perturbation)
            tensors = [None if part is None else torch.as_tensor(part)[None].to(self.device) for part in parts]
            self._actions[perturbation] = Action(*tensors)
        return self._actions[perturbation]


# -- summaries of cells -------------------------------------------------------------------------------------------------


@dataclass
class Predicted:
    """Summaries of some cells.

    Attributes
    ----------
    mean, low, high
        Mean and interval of expression, ``(n_perturbations, n_cells, n_genes)``; the ends may be `None`.
    latent
        Mean latent state under each perturbation, ``(n_perturbations, n_cells, n_latent)``.
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


def predict_blocks(
    predictor: Predictor,
    perturbations: Sequence[Perturbation],
    discrepancy: Discrepancy,
    *,
    ci: float | None,
    effects: EffectSums | None = None,
    first_cell: int = 0,
) -> Iterator[Predicted]:
    """Summaries of cells, block by block; on the way `effects` is filled.

    Parameters
    ----------
    predictor
        What predicts.
    perturbations
        To predict.
    discrepancy
        How far effects are from the truth: widens intervals.
    ci
        Level of the interval; `None` for none.
    effects
        Sums over the control cells.
    first_cell
        Where to begin, the start of a block.
    """
    query = predictor.query
    counted = np.isin(query.rows, query.controls_or_all().rows) if effects is not None else None
    widening = None if ci is None else _Widening(predictor, perturbations, discrepancy, ci)
    # where expression ends at 0, predictions do; effects are sums of what the model says
    least = 0.0 if query.registered.nonnegative else -np.inf
    for block in predictor.blocks(first_cell):
        parts: dict[str, list[Tensor]] = {"mean": [], "low": [], "high": [], "latent": []}
        own = block.own()
        weights = None if effects is None else add_control(effects, predictor, block, counted)
        for q, perturbation in enumerate(perturbations):
            found = block.under(perturbation)
            x = block.mean(found)
            mean = x.mean(0)
            parts["mean"].append(mean.clamp(min=least))
            parts["latent"].append(found.state.mean(0))
            if effects is not None:
                effects.add(q, weights, x)
            if widening is not None:
                low, high = quantiles(block.draws(found), ((1 - ci) / 2, (1 + ci) / 2))
                if widening.needed:
                    low, high = widened(mean, low, high, widening.half_width(q, block, mean, own))
                parts["low"].append(low.clamp(min=least))
                parts["high"].append(high.clamp(min=least))
        arrays = {k: torch.stack(v).cpu().numpy() if v else None for k, v in parts.items()}
        yield Predicted(**arrays, basal=block.basal_state().mean(0, keepdim=True).cpu().numpy())


def predict_cells(
    predictor: Predictor, perturbations: Sequence[Perturbation], discrepancy: Discrepancy, **options: Any
) -> Predicted:
    """Summaries of all cells at once; arguments as of :func:`predict_blocks`."""
    result: Predicted | None = None
    start = 0
    for part in predict_blocks(predictor, perturbations, discrepancy, **options):
        if result is None:
            n_cells = len(predictor.query)
            empty = {n: np.empty((len(array), n_cells, array.shape[2]), np.float32) for n, array in part.items()}
            result = Predicted(**{f.name: empty.get(f.name) for f in fields(Predicted)})
        stop = start + part.n_cells
        for name, array in part.items():
            getattr(result, name)[:, start:stop] = array
        start = stop
    return result


# -- effects ------------------------------------------------------------------------------------------------------------


def add_control(effects: EffectSums, predictor: Predictor, block: Block, counted: NDArray[np.bool_]) -> Tensor:
    """Add what cells of a block are without the perturbation; which cells count for which context is returned.

    A control cell is its own control, exactly as it was measured. Treated cells, which stand in where a context has no
    controls, are compared with themselves had nothing been done to them.
    """
    own = block.own()
    weights = effects.weights(block.context, counted[block.positions], own)
    effects.add_cells(weights, block.cells.library)
    treated = block.cells.action.present.any(1)
    as_measured = not predictor.settings.changes and predictor.settings.noise == "own"
    if not as_measured or bool((treated & weights.any(0)).any()):
        own = block.mean(block.under(Perturbation(predictor.vocabulary.control)))
    effects.add_control(weights, own)
    return weights


def sum_effects(predictor: Predictor, perturbations: Sequence[Perturbation]) -> EffectSums:
    """Sums over all cells of the query, by context."""
    query = predictor.query
    effects = EffectSums(
        len(perturbations), predictor.settings.n_samples, query.dataset.n_genes, np.unique(query.context)
    )
    counted = np.ones(len(query), dtype=bool)
    for block in predictor.blocks():
        weights = add_control(effects, predictor, block, counted)
        for q, perturbation in enumerate(perturbations):
            effects.add(q, weights, block.mean(block.under(perturbation)))
    return effects


def mean_effects(predictor: Predictor, perturbations: Sequence[Perturbation]) -> NDArray[np.float64]:
    """Effects averaged over the cells of the query, whatever their context, ``(n_perturbations, n_genes)``."""
    total = np.zeros((len(perturbations), predictor.query.dataset.n_genes))
    for block in predictor.blocks():
        own = block.own()
        for q, perturbation in enumerate(perturbations):
            total[q] += (block.mean(block.under(perturbation)).mean(0) - own).sum(0).double().cpu().numpy()
    return total / len(predictor.query)


# -- intervals of cells -------------------------------------------------------------------------------------------------


class _Widening:
    """What the discrepancy adds to the intervals of cells.

    It is in proportion to how far a prediction is from the cell's own state, which was measured: nothing is added where
    the cell's own perturbation is predicted.
    """

    def __init__(
        self, predictor: Predictor, perturbations: Sequence[Perturbation], discrepancy: Discrepancy, ci: float
    ) -> None:
        query = predictor.query
        self.discrepancy, self.scale = discrepancy, predictor.settings.scale
        self.ci, self.z = ci, float(stats.norm.ppf((1 + ci) / 2))
        self.perturbations, self.contexts = perturbations, query.contexts
        self.done, self._which = query.done(predictor.vocabulary)
        self.needed = discrepancy.calibration is not None

    def half_width(self, which: int, block: Block, mean: Tensor, own: Tensor) -> Tensor:
        """Half-widths to add, ``(n_cells, n_genes)``.

        Parameters
        ----------
        which
            Number of the perturbation.
        mean, own
            Mean expression under the perturbation and under the cells' own one, ``(n_cells, n_genes)``.
        """
        # cells of a block have few perturbations and contexts
        kinds, kind = np.unique(np.stack([self._which[block.positions], block.context]), axis=1, return_inverse=True)
        gene, effect = np.zeros((kinds.shape[1], mean.shape[1])), np.zeros((kinds.shape[1], 1))
        for row, (done, context) in enumerate(kinds.T):
            asked = self.perturbations[which]
            if not _alike(asked, self.done[done]):
                there, here = (
                    self.discrepancy.spread(p, self.contexts[context], self.ci) for p in (asked, self.done[done])
                )
                gene[row] = there.gene + here.gene + self.discrepancy.noise
                effect[row] = max(there.effect + there.response, here.effect + here.response)
        gene2, effect2 = (
            torch.as_tensor(v[kind.ravel()], dtype=mean.dtype, device=mean.device) for v in (gene, effect)
        )
        unit = self.discrepancy.unit(self.scale, own, block.cells.library)
        return self.z * (gene2 * unit**2 + effect2 * (mean - own) ** 2).sqrt()


def _alike(one: Perturbation, other: Perturbation) -> bool:
    return (
        one.label == other.label
        and len(one.dose) == len(other.dose)
        and np.allclose(one.dose, other.dose, rtol=DOSE_TOLERANCE, atol=0.0)
    )


def quantiles(x: Tensor, levels: Sequence[float]) -> list[Tensor]:
    """Quantiles over the first dimension, linearly interpolated.

    :func:`torch.quantile` takes no more than 16 million numbers, and numpy sorts four times faster on a CPU.
    """
    ordered = torch.from_numpy(np.sort(x.numpy(), axis=0)) if x.device.type == "cpu" else x.sort(dim=0).values
    result = []
    for level in levels:
        at = level * (len(x) - 1)
        low = min(int(at), max(len(x) - 2, 0))
        high = min(low + 1, len(x) - 1)
        result.append(torch.lerp(ordered[low], ordered[high], at - low))
    return result
