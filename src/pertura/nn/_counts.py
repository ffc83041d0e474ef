"""Negative binomial counts under another mean: the cell's own noise kept, and expectations without drawing.

The noise of a count x of mean m is its quantile u, uniform between F(x - 1) and F(x). Under another mean m' the count is F'^-1(u).
Asked for its own mean, a count comes back.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numba import njit
from torch import Tensor

_compiled = njit(nogil=True, cache=True, error_model="numpy")

_TARGET_SUM = 1e4
# Means that differ by less than the rounding of a decoder in float32 are the same mean.
_SAME = 1e-5
# Counts above this are moved by the variance-stabilizing coupling, at a cost that does not grow with the count.
_LARGE_COUNT = 256
# -log P(x = 0) up to which cumulative probabilities are summed; float64 underflows at 745.
_MAX_EXPONENT = 256.0
# A count whose probability is below this share of F(x - 1) is too far in the upper tail to be told from its neighbors in float64.
_SATURATED = 1e-8
# Sums stop here: a quantile this far out is met where a mean is raised by orders of magnitude alone.
_MAX_COUNT = 100_000
_OFFSET = 0.375
_N_TABLE = 64
_0, _1, _2, _1_2, _1_3, _1_4, _1_5, _2_5, _1_6, _1_7, _1_24, _1_120, _256, _SAME32 = np.float32(
    [0, 1, 2, 1 / 2, 1 / 3, 1 / 4, 1 / 5, 2 / 5, 1 / 6, 1 / 7, 1 / 24, 1 / 120, 256, _SAME]
)
# Nodes of the trapezoid rule in log t; its error falls as exp(-pi^2 / step).
_STEP = 1.0
_NODES = np.exp(_STEP * np.arange(math.floor(-26.0 / _STEP), math.ceil(2.6 / _STEP) + 1))
_WEIGHTS = _STEP * np.exp(-_NODES)


@_compiled
def _moved(value: float, before: float, after: float, theta: float) -> float:
    """The value as far from `after` as it was from `before`, measured by asinh(sqrt(. / theta)); 0 where there is none.

    exp(asinh(a)) is a + sqrt(1 + a^2), so that no transcendental function is needed.
    """
    value, before, after = value / theta, before / theta, after / theta
    e = (math.sqrt(value) + math.sqrt(1.0 + value)) * (math.sqrt(after) + math.sqrt(1.0 + after))
    e /= math.sqrt(before) + math.sqrt(1.0 + before)
    if e <= 1.0:
        return 0.0
    half = 0.5 * (e - 1.0 / e)
    return half * half * theta


@_compiled
def _stabilized(x: float, mean: float, mean2: float, theta: float) -> float:
    """Count under mean2 by the variance-stabilizing coupling, a real number; 3/8 as in Anscombe's transformation."""
    return max(_moved(x + _OFFSET, mean, mean2, theta) - _OFFSET, 0.0)


@_compiled
def _anchor(x: float, mean: float, theta: float, max_mean: float) -> tuple[int, float]:
    """A count and a mean on the path of the stabilizing coupling at which probabilities can be summed."""
    if x <= _LARGE_COUNT and mean <= max_mean:
        return int(x), mean
    count = math.floor(min(_stabilized(x, mean, max_mean, theta), float(_LARGE_COUNT)))
    # the mean at which this cell would have that count: counts and means change places
    return int(count), min(_moved(mean, x + _OFFSET, count + _OFFSET, theta), max_mean)


@_compiled
def _log_ratio(half: float) -> float:
    """Log of (1 + half) / (1 - half) by series; its relative error is below 1e-6 for |half| < 0.4, and below 1e-12 for |half| < 0.1."""
    h = half * half
    tail = 1.0 / 7.0 + h * (1.0 / 9.0 + h * (1.0 / 11.0 + h / 13.0))
    return 2.0 * half * (1.0 + h * (1.0 / 3.0 + h * (0.2 + h * tail)))


@_compiled
def _exp(x: float) -> float:
    """Exponential by series; its relative error is below 1e-6 for |x| < 16, and below 1e-11 for |x| < 4."""
    x *= 1.0 / 64.0
    e = 1.0 + x * (1.0 + x * (0.5 + x * (1.0 / 6.0 + x * (1.0 / 24.0 + x * (1.0 / 120.0 + x * (1.0 / 720.0))))))
    for _ in range(6):
        e = e * e
    return e


@_compiled
def _zeros(step: float, size: float, theta: float) -> float:
    """(1 + step / size)^-theta: the probability of 0 for (mean, theta), and the ratio of two of them for (mean2 - mean, mean + theta)."""
    half = step / (2.0 * size + step)
    return math.exp(-theta * (_log_ratio(half) if 0.0 <= half < 0.25 else math.log1p(step / size)))


@_compiled
def _below(x: int, mean: float, theta: float) -> tuple[float, float]:
    """F(x - 1) and the probability of x."""
    q = mean / (mean + theta)
    probability = _zeros(mean, theta, theta)
    below = 0.0
    for k in range(x):
        below += probability
        probability *= (k + theta) / (k + 1.0) * q
    return below, probability


@_compiled
def _value(k: float, factor: float, table: np.ndarray) -> float:
    """log1p(factor k), or k where the factor is 0."""
    if k < _N_TABLE:
        return table[int(k)]
    return math.log1p(factor * k) if factor > 0.0 else k


@_compiled
def _value_between(y: float, low: float, high: float, factor: float, table: np.ndarray) -> float:
    """Integral of the value of floor(y + v) over v from low to high, both within 0 and 1."""
    k = math.floor(y)
    up = max(0.0, high - max(low, 1.0 - (y - k)))
    return (high - low - up) * _value(k, factor, table) + up * _value(k + 1.0, factor, table)


@_compiled
def _overlap_mean(
    below: float,
    width: float,
    probability: float,
    mean2: float,
    theta: float,
    max_mean: float,
    factor: float,
    table: np.ndarray,
) -> float:
    """Mean of the value of F2^-1(u), u uniform from `below` to `below + width`; `probability` is that of 0 under mean2.

    Everything may be divided by the same number. Beyond `max_mean`, F2 is that of `max_mean`, and the count moves on by the stabilizing coupling.
    """
    bounded = min(mean2, max_mean)
    q = bounded / (bounded + theta)
    upper = below + width
    cumulative, k, low, total = probability, 0, below, 0.0
    while cumulative <= below and k < _MAX_COUNT:
        probability *= (k + theta) / (k + 1.0) * q
        cumulative += probability
        k += 1
    while True:
        last = (
            cumulative >= upper - 1e-6 * width or k >= _MAX_COUNT or (k > bounded and probability < 1e-17 * cumulative)
        )
        high = upper if last else cumulative
        if mean2 > max_mean:
            y = _stabilized(k, max_mean, mean2, theta)
            total += width * _value_between(y, (low - below) / width, (high - below) / width, factor, table)
        else:
            total += (high - low) * _value(k, factor, table)
        if last:
            return total / width
        low = high
        probability *= (k + theta) / (k + 1.0) * q
        cumulative += probability
        k += 1


@_compiled
def _mean_of_one(
    x: float, mean: float, mean2: float, theta: float, max_mean: float, factor: float, table: np.ndarray
) -> float:
    """Conditional mean of one entry, in general."""
    if not (mean >= 0.0 and mean2 >= 0.0 and mean + mean2 < math.inf):
        return math.nan
    if abs(mean2 - mean) <= _SAME * mean:
        return _value(x, factor, table) if x == math.floor(x) else math.log1p(factor * x) if factor > 0.0 else x
    count, at = _anchor(x, mean, theta, max_mean)
    if at != mean or count != x:
        y = _stabilized(x, mean, mean2, theta)
        if mean2 >= at:
            return _value_between(y, 0.0, 1.0, factor, table)
    below, width = _below(count, at, theta)
    if width < _SATURATED * below:
        return _value_between(_stabilized(x, mean, mean2, theta), 0.0, 1.0, factor, table)
    bounded = min(mean2, max_mean)
    probability = _zeros(bounded, theta, theta)
    return _overlap_mean(below, width, probability, mean2, theta, max_mean, factor, table)


@_compiled
def _replay_of_one(x: float, mean: float, mean2: float, theta: float, max_mean: float, v: float) -> float:
    """Count under mean2 at the position v within the interval of x."""
    if not (mean >= 0.0 and mean2 >= 0.0 and mean + mean2 < math.inf):
        return math.nan
    if abs(mean2 - mean) <= _SAME * mean or (x == 0.0 and mean2 <= mean):
        return x
    count, at = _anchor(x, mean, theta, max_mean)
    if (at != mean or count != x) and mean2 >= at:
        return math.floor(_stabilized(x, mean, mean2, theta) + v)
    below, width = _below(count, at, theta)
    if width < _SATURATED * below:
        return math.floor(_stabilized(x, mean, mean2, theta) + v)
    bounded = min(mean2, max_mean)
    q = bounded / (bounded + theta)
    wanted = below + v * width
    probability = _zeros(bounded, theta, theta)
    cumulative, k = probability, 0
    while cumulative < wanted and k < _MAX_COUNT and not (k > bounded and probability < 1e-17 * cumulative):
        probability *= (k + theta) / (k + 1.0) * q
        cumulative += probability
        k += 1
    return math.floor(_stabilized(k, max_mean, mean2, theta) + v) if mean2 > max_mean else float(k)


@_compiled
def _fill(factor: float, table: np.ndarray) -> None:
    """The values of small counts."""
    for k in range(_N_TABLE):
        table[k] = math.log1p(factor * k) if factor > 0.0 else k


@_compiled
def _zeros_moved(
    x: np.ndarray,
    mean: np.ndarray,
    mean2: np.ndarray,
    theta: np.ndarray,
    value: np.float32,
    moved: np.ndarray,
    done: np.ndarray,
) -> None:
    """What zeros become where it is no more than one, `value`; `done` says where.

    Most entries of sparse counts. In float32 and without branches, so that the compiler vectorizes it; the series are short.
    """
    for gene in range(len(x)):
        m, m2, th = mean[gene], mean2[gene], theta[gene]
        step = m2 - m if m2 - m > _SAME32 * m else _0
        half = step / (_2 * (m + th) + step)
        square = half * half
        y = _2 * th * half * (_1 + square * (_1_3 + square * (_1_5 + square * _1_7)))
        # 1 - F2(0) / F(0)
        left = y * (_1 - y * (_1_2 - y * (_1_6 - y * (_1_24 - y * _1_120))))
        moved[gene] = left * value
        one = (half < _1_4) & (y < _2_5) & (left * (m2 + th + th * m2) <= th * m2) & (m2 < _256)
        done[gene] = (x[gene] == _0) & (m >= _0) & ((m2 <= m) | (one & (m2 > m)))


@_compiled
def _few_moved(
    x: np.ndarray,
    mean: np.ndarray,
    mean2: np.ndarray,
    theta: np.ndarray,
    table: np.ndarray,
    moved: np.ndarray,
    done: np.ndarray,
) -> None:
    """`_overlap_mean` of counts up to 4 where means are below 16; `done` says where.

    Nearly all entries that are not zero. Without branches, so that the compiler vectorizes it: eight counts are looked at, whatever the mean.
    """
    v0, v1, v2, v3, v4, v5, v6, v7, v8 = (
        table[0],
        table[1],
        table[2],
        table[3],
        table[4],
        table[5],
        table[6],
        table[7],
        table[8],
    )
    for i in range(len(x)):
        count, m, m2, th = x[i], mean[i], mean2[i], theta[i]
        odds, q2 = 1.0 / (m + th), m2 / (m2 + th)
        root, half = math.sqrt(math.sqrt(th * odds)), (m2 - m) / (m2 + m + 2.0 * th)
        q, zero = m * odds, _exp(-4.0 * th * _log_ratio((1.0 - root) / (1.0 + root)))
        probability, below, width = zero, 0.0, 0.0
        for k in range(5):
            below += probability * (k < count)
            width += probability * (k == count)
            probability *= (k + th) * (1.0 / (k + 1.0)) * q
        probability, k = zero * _exp(-th * _log_ratio(half)), 0
        left, total = below + width, 0.0
        for rise in (v1 - v0, v2 - v1, v3 - v2, v4 - v3, v5 - v4, v6 - v5, v7 - v6, v8 - v7):
            # how much of the interval is above F2(k)
            left -= probability
            total += rise * max(0.0, min(left, width))
            probability *= (k + th) * (1.0 / (k + 1.0)) * q2
            k += 1
        moved[i] = total / width
        moderate = (m < 16.0) & (m2 < 16.0) & (root > 0.5) & (abs(half) < 0.4) & (abs(m2 - m) > _SAME * m)
        # counts above 4 have no width here
        done[i] = moderate & (left <= 1e-6 * width) & (width > _SATURATED * below)


@_compiled
def _conditional_mean(
    first: int,
    last: int,
    x: np.ndarray,
    mean: np.ndarray,
    mean2: np.ndarray,
    theta: np.ndarray,
    max_mean: np.ndarray,
    factor: np.ndarray,
    out: np.ndarray,
) -> None:
    n_draws, _, n_genes = out.shape
    table, done = np.empty(_N_TABLE), np.empty(n_genes, dtype=np.bool_)
    which, entries, moved = np.empty(n_genes, dtype=np.uint64), np.empty((4, n_genes)), np.empty(n_genes)
    for cell in range(first, last):
        for draw in range(n_draws):
            scale = factor[draw if len(factor) > 1 else 0, cell]
            if draw == 0 or len(factor) > 1:
                _fill(scale, table)
            counts = x[draw if len(x) > 1 else 0, cell]
            means, means2 = mean[draw if len(mean) > 1 else 0, cell], mean2[draw if len(mean2) > 1 else 0, cell]
            result = out[draw, cell]
            _zeros_moved(counts, means, means2, theta, np.float32(table[1]), result, done)
            n = 0
            for gene in range(n_genes):
                which[n] = gene
                n += not done[gene]
            for i in range(n):
                gene = which[i]
                entries[0, i], entries[1, i] = counts[gene], means[gene]
                entries[2, i], entries[3, i] = means2[gene], theta[gene]
            c, m, m2, th = entries[0][:n], entries[1][:n], entries[2][:n], entries[3][:n]
            _few_moved(c, m, m2, th, table, moved, done)
            for i in range(n):
                gene = which[i]
                if not done[i]:
                    moved[i] = _mean_of_one(c[i], m[i], m2[i], th[i], max_mean[gene], scale, table)
                result[gene] = moved[i]


@_compiled
def _replay(
    first: int,
    last: int,
    x: np.ndarray,
    mean: np.ndarray,
    mean2: np.ndarray,
    v: np.ndarray,
    theta: np.ndarray,
    max_mean: np.ndarray,
    out: np.ndarray,
) -> None:
    n_draws, _, n_genes = out.shape
    for cell in range(first, last):
        for draw in range(n_draws):
            counts, at = x[draw if len(x) > 1 else 0, cell], v[draw if len(v) > 1 else 0, cell]
            means, means2 = mean[draw if len(mean) > 1 else 0, cell], mean2[draw if len(mean2) > 1 else 0, cell]
            for gene in range(n_genes):
                out[draw, cell, gene] = _replay_of_one(
                    np.float64(counts[gene]),
                    np.float64(means[gene]),
                    np.float64(means2[gene]),
                    np.float64(theta[gene]),
                    max_mean[gene],
                    np.float64(at[gene]),
                )


@_compiled
def _expected(first: int, last: int, mean: np.ndarray, theta: np.ndarray, factor: np.ndarray, out: np.ndarray) -> None:
    n_draws, _, n_genes = out.shape
    n_nodes = len(_NODES)
    table, transform = np.empty(_N_TABLE), np.empty(n_nodes)
    linear, square = np.empty(n_nodes), np.empty(n_nodes)
    for cell in range(first, last):
        for draw in range(n_draws):
            scale = factor[draw if len(factor) > 1 else 0, cell]
            if draw == 0 or len(factor) > 1:
                _fill(scale, table)
                first_order = second_order = 0.0
                for i in range(n_nodes):
                    transform[i] = -math.expm1(-scale * _NODES[i])
                    first_order += _WEIGHTS[i] * transform[i]
                    second_order += _WEIGHTS[i] * transform[i] ** 2
                    linear[i], square[i] = first_order, second_order
            means = mean[draw if len(mean) > 1 else 0, cell]
            for gene in range(n_genes):
                m, th = np.float64(means[gene]), np.float64(theta[gene])
                if not (m >= 0.0 and m < math.inf):
                    out[draw, cell, gene] = math.nan
                    continue
                if m < 6.0:
                    # few counts have nearly all of the probability
                    q = m / (m + th)
                    probability = _zeros(m, th, th)
                    left, total, k = 1.0 - probability, 0.0, 0
                    while left > 4e-4 and k < 30:
                        probability *= (k + th) / (k + 1.0) * q
                        left -= probability
                        k += 1
                        total += probability * table[k]
                    if left <= 4e-4:
                        out[draw, cell, gene] = total + left * table[k + 1]
                        continue
                # log(1 + s x) is the integral of (1 - exp(-s x t)) exp(-t) / t, and E exp(-s x t) has a closed form
                total, i = 0.0, n_nodes - 1
                while i >= 0:
                    y = m * transform[i]
                    if y * (1.0 + 1.0 / th) < 0.1:
                        total += m * linear[i] - 0.5 * m * m * (1.0 + 1.0 / th) * square[i]
                        break
                    total += _WEIGHTS[i] * (1.0 - math.exp(-th * math.log(1.0 + y / th)))
                    i -= 1
                out[draw, cell, gene] = total


def _by_cells(kernel: Callable, n_cells: int, n_entries: int, *arguments: np.ndarray) -> None:
    """Run a kernel on ranges of cells, in as many threads as torch uses."""
    n_threads = min(torch.get_num_threads(), n_cells, 1 + n_entries // 50_000)
    if n_threads <= 1:
        kernel(0, n_cells, *arguments)
        return
    edges = np.linspace(0, n_cells, n_threads + 1).astype(int)
    with ThreadPoolExecutor(n_threads) as pool:
        for done in [pool.submit(kernel, a, b, *arguments) for a, b in zip(edges[:-1], edges[1:], strict=True)]:
            done.result()


def _draws_first(tensor: Tensor, shape: torch.Size) -> np.ndarray:
    """Float32 array of shape (n_draws or 1, n_cells, n_genes)."""
    lead = shape[:-2] if tensor.shape[:-2].numel() > 1 else ()
    tensor = tensor.detach().to("cpu", torch.float32).reshape(tensor.shape[-2:] if not lead else tensor.shape)
    return tensor.expand(*lead, *shape[-2:]).reshape(-1, *shape[-2:]).contiguous().numpy()


def _broadcast(*tensors: Tensor) -> torch.Size:
    shape = torch.broadcast_shapes(*(tensor.shape for tensor in tensors))
    return shape if len(shape) > 1 else torch.Size((1, *shape))


def _of_genes(theta: Tensor, n_genes: int) -> np.ndarray:
    if theta.numel() not in (1, n_genes):
        raise ValueError(
            f"theta has shape {tuple(theta.shape)}, but one inverse dispersion per gene is needed: shape ({n_genes},)."
        )
    return theta.detach().to("cpu", torch.float32).reshape(-1).expand(n_genes).contiguous().numpy()


def _max_mean(theta: np.ndarray) -> np.ndarray:
    """The mean at which the probability of 0 is exp(-256), one million at most."""
    theta = theta.astype(np.float64)
    return np.minimum(theta * np.expm1(np.minimum(_MAX_EXPONENT / theta, 30.0)), 1e6)


def _factor(scale: str, depth: Tensor | None, shape: torch.Size) -> np.ndarray:
    """What a count is multiplied by within the log1p, (n_draws or 1, n_cells); 0 for the counts themselves."""
    if scale == "counts":
        return np.zeros((1, shape[-2]))
    if scale != "log1p":
        raise ValueError(f"scale={scale!r} is none of counts; use 'counts' or 'log1p'.")
    if depth is None:
        raise ValueError("depth is None, but scale='log1p' divides by it; pass the library of each cell, (n_cells,).")
    depth = per_cell(depth)
    return _TARGET_SUM / _draws_first(depth, torch.broadcast_shapes(depth.shape, (*shape[:-1], 1)))[..., 0].astype(
        np.float64
    )


def per_cell(depth: Tensor) -> Tensor:
    """Depth as a column, ``(..., n_cells, 1)``, from that or ``(n_cells,)``."""
    return depth.reshape(-1, 1) if depth.ndim < 2 else depth


def conditional_mean(
    x: Tensor, mean: Tensor, mean2: Tensor, theta: Tensor, scale: str = "counts", depth: Tensor | None = None
) -> Tensor:
    """Mean of a cell's counts under another mean, given its own counts.

    The mean is over u, uniform between F(x - 1) and F(x), of the count F2^-1(u), or of its log1p(counts per 10,000). Overlaps of intervals
    give it without drawing. Counts above 256, means at which the probability of 0 is below exp(-256), and counts too far in the upper tail for
    float64 are moved by the variance-stabilizing coupling asinh(sqrt((x + 3/8) / theta)) instead.

    Parameters
    ----------
    x
        Counts, ``(n_cells, n_genes)`` or with draws in front.
    mean
        Mean under which the counts were measured, ``(n_draws, n_cells, n_genes)``; shapes broadcast.
    mean2
        Mean under which they are asked for.
    theta
        Inverse dispersion, ``(n_genes,)``, the same under both means.
    scale
        ``"counts"``, or ``"log1p"`` for log1p of counts per 10,000 of `depth`.
    depth
        Library of each cell, ``(n_cells,)`` or ``(..., n_cells, 1)``; needed for ``"log1p"`` alone.

    Returns
    -------
    Tensor of the broadcast shape and the dtype and device of `mean2`; no gradient. Not a number where a mean is not finite.
    """
    result = torch.broadcast_shapes(x.shape, mean.shape, mean2.shape)
    shape = _broadcast(x, mean, mean2)
    theta_ = _of_genes(theta, shape[-1])
    out = np.empty((shape[:-2].numel(), *shape[-2:]), dtype=np.float32)
    arrays = [_draws_first(one, shape) for one in (x, mean, mean2)]
    _by_cells(
        _conditional_mean, shape[-2], out.size, *arrays, theta_, _max_mean(theta_), _factor(scale, depth, shape), out
    )
    return torch.from_numpy(out).view(result).to(mean2)


def replay(x: Tensor, mean: Tensor, mean2: Tensor, theta: Tensor, v: Tensor) -> Tensor:
    """Counts of a cell under another mean, the quantiles of its own counts kept: F2^-1(F(x - 1) + v (F(x) - F(x - 1))).

    Parameters
    ----------
    x, mean, mean2, theta
        As in :func:`conditional_mean`, which is the mean of this over v.
    v
        Position within the interval of each count, between 0 and 1; its shape broadcasts.

    Returns
    -------
    Whole numbers of the broadcast shape, in the dtype and on the device of `mean2`; no gradient. They never fall where `mean2` rises.
    """
    result = torch.broadcast_shapes(x.shape, mean.shape, mean2.shape, v.shape)
    shape = _broadcast(x, mean, mean2, v)
    theta_ = _of_genes(theta, shape[-1])
    out = np.empty((shape[:-2].numel(), *shape[-2:]), dtype=np.float32)
    arrays = [_draws_first(one, shape) for one in (x, mean, mean2, v)]
    _by_cells(_replay, shape[-2], out.size, *arrays, theta_, _max_mean(theta_), out)
    return torch.from_numpy(out).view(result).to(mean2)


def expected(mean: Tensor, theta: Tensor, scale: str = "counts", depth: Tensor | None = None) -> Tensor:
    r"""Mean of negative binomial counts, or of their log1p(counts per 10,000), without drawing.

    Parameters
    ----------
    mean
        ``(..., n_cells, n_genes)``.
    theta
        Inverse dispersion, ``(n_genes,)``.
    scale, depth
        As in :func:`conditional_mean`.

    Returns
    -------
    Tensor like `mean`; no gradient on ``"log1p"``. The absolute error is below 1e-3.

    Notes
    -----
    Small means: the sum over counts. Otherwise, with :math:`s = 10^4 / \text{depth}`,
    :math:`E \log(1 + s X) = \int_0^\infty (1 - E e^{-s X t}) e^{-t} / t \, dt` (Frullani), in which
    :math:`E e^{-s X t} = (1 + (1 - e^{-s t}) \mu / \theta)^{-\theta}`, by the trapezoid rule in :math:`\log t`.
    """
    if scale == "counts":
        return mean
    shape = _broadcast(mean)
    out = np.empty((shape[:-2].numel(), *shape[-2:]), dtype=np.float32)
    factor = _factor(scale, depth, shape)
    _by_cells(_expected, shape[-2], out.size, _draws_first(mean, shape), _of_genes(theta, shape[-1]), factor, out)
    return torch.from_numpy(out).view(mean.shape).to(mean)
