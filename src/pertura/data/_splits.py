"""Splits that ask a stated question: an unseen or hardly seen context, an unseen perturbation, combination or dose, or unseen cells.

Every generator returns :class:`Split` objects, whose parts are disjoint by construction and whose held-out
label is checked to be absent from the training rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import ArrayLike, NDArray

from ._partition import SEPARATOR, Rows, Split, as_obs

__all__ = [
    "Split",
    "as_obs",
    "few_shot_context",
    "held_out_cells",
    "leave_context_out",
    "unseen_combination",
    "unseen_dose",
    "unseen_perturbation",
]


def _column(adata: AnnData, key: str, argument: str) -> NDArray[np.object_]:
    if key not in adata.obs:
        raise ValueError(f"`{argument}`: adata.obs has no column {key!r}; it has {list(adata.obs.columns)}.")
    if adata.obs[key].isna().any():
        raise ValueError(f"`{argument}`: adata.obs[{key!r}] has missing values; drop or label those cells.")
    return adata.obs[key].astype(str).to_numpy(dtype=object)


def _perturbations(adata: AnnData, key: str, control: str | None) -> tuple[NDArray[np.object_], NDArray[np.bool_]]:
    """Label of each cell and whether it is treated; without a control all rows are effects."""
    label = _column(adata, key, "perturbation_key")
    if control is None:
        return label, np.ones(len(label), dtype=bool)
    treated = label != str(control)
    if treated.all():
        raise ValueError(
            f"`control`: no cell is labelled {control!r} in {key!r}; labels are {list(pd.unique(label)[:10])}."
        )
    if not treated.any():
        raise ValueError(f"`perturbation_key`: every cell of {key!r} is control; there is nothing to hold out.")
    return label, treated


def _choice(wanted: Iterable[Any] | None, present: Iterable[str], argument: str) -> list[str]:
    """Labels to use: all present ones, or the wanted ones, which must be present."""
    present = sorted(set(present))
    if wanted is None:
        return present
    names = [str(w) for w in ([wanted] if isinstance(wanted, str | int | float) else wanted)]
    missing = sorted(set(names) - set(present))
    if missing or not names:
        raise ValueError(f"`{argument}`: {missing or 'nothing'} not found; there are {present[:10]}.")
    return names


def _fraction(value: float, argument: str, *, zero: bool = False) -> float:
    if not (0 <= value < 1 if zero else 0 < value < 1):
        raise ValueError(f"`{argument}` must lie {'in [0, 1)' if zero else 'between 0 and 1'}, got {value!r}.")
    return float(value)


def _rank_within(groups: ArrayLike, rng: np.random.Generator) -> tuple[Rows, Rows]:
    """Random rank of each row within its group, and the size of its group."""
    codes = pd.factorize(np.asarray(groups))[0]
    order = rng.permutation(len(codes))
    rank = np.empty(len(codes), dtype=np.intp)
    rank[order] = pd.Series(codes[order]).groupby(codes[order]).cumcount().to_numpy()
    return rank, np.bincount(codes)[codes]


def _pick(rows: Rows, groups: ArrayLike, fraction: float, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Mask over `rows`: a fraction of each group, never the whole of it."""
    rank, size = _rank_within(np.asarray(groups)[rows], rng)
    return rank < np.minimum(np.rint(fraction * size), size - 1)


def _make(
    train: NDArray[np.bool_], test: NDArray[np.bool_], strata: ArrayLike, val_fraction: float, **about: Any
) -> Split:
    """Split from masks, with a stratified part of the training rows set aside for validation."""
    rows = np.flatnonzero(train)
    rng = np.random.default_rng(about.pop("val_seed", 0))
    val = _pick(rows, strata, _fraction(val_fraction, "val_fraction", zero=True), rng)
    return Split(rows[~val], np.flatnonzero(test), rows[val], **about)


def leave_context_out(
    adata: AnnData,
    *,
    perturbation_key: str,
    control: str,
    context_key: str,
    perturbations: Iterable[str] | None = None,
    contexts: Iterable[str] | None = None,
    val_fraction: float = 0.0,
    seed: int = 0,
) -> list[Split]:
    """One split for each context: all its treated cells are test, its control cells stay in train.

    Parameters
    ----------
    adata
        The cells.
    perturbation_key, context_key
        Columns of ``adata.obs``.
    control
        Label of control cells.
    perturbations
        Hold out only these in the context; its other treated cells then stay in train. Default: all.
    contexts
        Contexts to hold out, one at a time; default every context that has treated and control cells.
    val_fraction
        Part of the training rows for validation, stratified by perturbation and context.
    seed
        Of the validation rows.
    """
    label, treated = _perturbations(adata, perturbation_key, control)
    context = _column(adata, context_key, "context_key")
    chosen = treated & np.isin(label, _choice(perturbations, label[treated], "perturbations"))
    splits = []
    usable = set(context[chosen]) & set(context[~treated])
    for name in _choice(contexts, usable, "contexts"):
        test = chosen & (context == name)
        split = _make(
            ~test,
            test,
            label + "|" + context,
            val_fraction,
            name=f"context={name}",
            kind="unseen_context",
            held_out=(name,),
            seed=seed,
            val_seed=seed,
        )
        split.check_held_out(np.where(chosen, context, ""), separator=None)
        splits.append(split)
    if not splits:
        raise ValueError(f"`context_key`: no context of {context_key!r} has both treated and control cells.")
    return splits


def few_shot_context(
    adata: AnnData,
    *,
    perturbation_key: str,
    control: str | None,
    context_key: str,
    shots: Sequence[float] = (5, 10, 20),
    contexts: Iterable[str] | None = None,
    n_splits: int = 1,
    val_fraction: float = 0.0,
    seed: int = 0,
) -> list[Split]:
    """Few treated cells of a context, or some of its perturbations, train; one split for each context and number.

    Parts are nested, and the test rows are the same for all numbers: rows that the largest number has in training are not tested.

    Parameters
    ----------
    adata
        The cells.
    perturbation_key, context_key
        Columns of ``adata.obs``.
    control
        Label of control cells, which stay in train; `None` for rows of effects, which have no controls.
    shots
        Whole numbers: so many cells of each perturbation of the context train, the others are test. A perturbation with fewer than
        twice the largest number is in neither part. Numbers below 1: that share of the perturbations of the context trains with
        all its cells, at least one. 0: as in :func:`leave_context_out`.
    contexts
        Contexts, one at a time; by default all with treated and control cells that have enough cells or perturbations.
    n_splits
        Number of random choices.
    val_fraction
        Part of the training rows for validation, stratified by perturbation and context.
    seed
        Of the first choice; choice i uses ``seed + i``.

    Raises
    ------
    ValueError
        Where `shots` mixes numbers and shares, or no context has enough cells or perturbations.
    """
    label, treated = _perturbations(adata, perturbation_key, control)
    context = _column(adata, context_key, "context_key")
    # "A+B" and "B+A" are one
    one = {name: SEPARATOR.join(sorted(set(name.split(SEPARATOR)) - {str(control)})) for name in set(label[treated])}
    label[treated] = [one[name] for name in label[treated]]
    shots = sorted(set(shots))
    shares = bool(shots) and shots[-1] < 1
    if not shots or shots[0] < 0 or not (shares or all(float(s).is_integer() for s in shots)):
        raise ValueError(f"`shots` must be numbers of cells, or shares below 1 of the perturbations, got {shots}.")
    compared = treated if control is None else ~treated
    names = _choice(contexts, set(context[treated]) & set(context[compared]), "contexts")
    splits = []
    for s in range(seed, seed + n_splits):
        rng = np.random.default_rng([s, 2])
        for name in names:
            own = np.flatnonzero(treated & (context == name))
            if shares:
                groups = np.unique(label[own].astype(str), return_inverse=True)[1]
                place = rng.permutation(groups.max() + 1)[groups]  # of a cell's perturbation
                numbers = [max(1, round(share * (groups.max() + 1))) if share else 0 for share in shots]
                enough = np.full(len(own), groups.max() + 1 > numbers[-1])
            else:
                numbers = [int(n) for n in shots]
                place, size = _rank_within(label[own], rng)
                enough = size >= max(2 * numbers[-1], 1)
            test = np.zeros(len(label), dtype=bool)
            test[own[enough & (place >= numbers[-1])]] = True
            if not test.any():
                if contexts is not None:
                    raise ValueError(f"`shots`: context {name!r} has too few cells or perturbations for {shots[-1]}.")
                continue
            for shot, number in zip(shots, numbers, strict=True):
                train = ~(treated & (context == name))
                train[own[enough & (place < number)]] = True
                amount = f"{shot:.0%} of perturbations" if shares else f"{number} cells"
                split = _make(
                    train,
                    test,
                    label + "|" + context,
                    val_fraction,
                    name=f"context={name}, {amount}" + (f", seed={s}" if n_splits > 1 else ""),
                    kind=f"few_shot_context ({amount})",
                    held_out=tuple(sorted({f"{held}|{name}" for held in label[test]})) if shares or not number else (),
                    seed=s,
                    val_seed=s,
                )
                split.check_held_out(label + "|" + context, separator=None)
                splits.append(split)
    if not splits:
        raise ValueError(f"`shots`: no context of {context_key!r} has enough cells or perturbations for {shots[-1]}.")
    return splits


def unseen_perturbation(
    adata: AnnData,
    *,
    perturbation_key: str,
    control: str,
    n_folds: int = 5,
    include_combinations: bool = True,
    val_fraction: float = 0.0,
    seed: int = 0,
) -> list[Split]:
    """Folds over perturbations; held-out ones are not trained on, neither alone nor in a combination.

    Parameters
    ----------
    adata, perturbation_key, control
        The cells, the column of ``obs`` and its label of control cells. Combinations are written ``"A+B"``.
    n_folds
        Number of folds; every single perturbation is held out once.
    include_combinations
        Test on combinations with a held-out perturbation as well (with one or both parts unseen). Otherwise
        they are in neither part.
    val_fraction
        Part of the training rows for validation, stratified by perturbation.
    seed
        Of the folds.
    """
    label, treated = _perturbations(adata, perturbation_key, control)
    parts = {name: frozenset(name.split(SEPARATOR)) - {str(control)} for name in set(label[treated])}
    single = np.array(sorted(frozenset().union(*parts.values())), dtype=object)
    if not 2 <= n_folds <= len(single):
        raise ValueError(f"`n_folds` must lie between 2 and {len(single)}, the number of perturbations; got {n_folds}.")
    shuffled = np.random.default_rng(seed).permutation(single)
    splits = []
    for fold, names in enumerate(np.array_split(shuffled, n_folds)):
        touched = [name for name, p in parts.items() if p & set(names)]
        affected = np.isin(label, touched)
        tested = affected if include_combinations else np.isin(label, [n for n in touched if len(parts[n]) == 1])
        split = _make(
            ~affected,
            tested,
            label,
            val_fraction,
            name=f"fold={fold}",
            kind="unseen_perturbation",
            held_out=tuple(sorted(names)),
            seed=seed,
            val_seed=seed,
        )
        split.check_held_out(label)
        splits.append(split)
    return splits


def unseen_combination(
    adata: AnnData,
    *,
    perturbation_key: str,
    control: str,
    fraction: float = 0.5,
    n_splits: int = 1,
    val_fraction: float = 0.0,
    seed: int = 0,
) -> list[Split]:
    """Hold out a fraction of the combinations; single perturbations and the other combinations stay in train.

    Parameters
    ----------
    adata, perturbation_key, control
        The cells, the column of ``obs`` and its label of control cells. Combinations are written ``"A+B"``;
        ``"A+B"`` and ``"B+A"`` are one, and ``"A+" + control`` is a single.
    fraction
        Share of the combinations to hold out, at least one.
    n_splits
        Number of random splits.
    val_fraction
        Part of the training rows for validation, stratified by perturbation.
    seed
        Of the first split; split i uses ``seed + i``.
    """
    label, treated = _perturbations(adata, perturbation_key, control)
    sets = {name: tuple(sorted(set(name.split(SEPARATOR)) - {str(control)})) for name in set(label[treated])}
    combinations = sorted({parts for parts in sets.values() if len(parts) > 1})
    if not combinations:
        raise ValueError(f"`perturbation_key`: {perturbation_key!r} has no combination 'A{SEPARATOR}B'.")
    n_out = max(1, round(_fraction(fraction, "fraction") * len(combinations)))
    splits = []
    for s in range(seed, seed + n_splits):
        at = np.random.default_rng(s).choice(len(combinations), n_out, replace=False)
        out = {combinations[i] for i in at}
        names = sorted(name for name, parts in sets.items() if parts in out)
        test = np.isin(label, names)
        split = _make(
            ~test,
            test,
            label,
            val_fraction,
            name=f"seed={s}",
            kind="unseen_combination",
            held_out=tuple(names),
            seed=s,
            val_seed=s,
        )
        split.check_held_out(label)
        splits.append(split)
    return splits


def unseen_dose(
    adata: AnnData,
    *,
    perturbation_key: str,
    control: str,
    dose_key: str,
    doses: Iterable[Any] | None = None,
    perturbations: Iterable[str] | None = None,
    val_fraction: float = 0.0,
    seed: int = 0,
) -> list[Split]:
    """One split for each dose: treated cells at that dose are test, other doses and the controls are train.

    Parameters
    ----------
    adata, perturbation_key, control
        The cells, the column of ``obs`` and its label of control cells.
    dose_key
        Column of ``adata.obs`` with the dose.
    doses
        Doses to hold out, one at a time; default every dose of a treated cell. Holding out the largest or
        smallest asks for extrapolation, the others for interpolation.
    perturbations
        Hold out the dose for these only.
    val_fraction
        Part of the training rows for validation, stratified by perturbation and dose.
    seed
        Of the validation rows.
    """
    label, treated = _perturbations(adata, perturbation_key, control)
    dose = _column(adata, dose_key, "dose_key")
    chosen = treated & np.isin(label, _choice(perturbations, label[treated], "perturbations"))
    present = list(pd.unique(adata.obs[dose_key][chosen]))
    # Compared as values where they are numbers, so that 1 and 1.0 name the same dose.
    names = {value: str(value) for value in present}
    wanted = present if doses is None else list(doses)
    missing = [value for value in wanted if value not in names]
    if missing or not wanted:
        raise ValueError(
            f"`doses`: {missing or 'nothing'} not found; treated cells have {sorted(names.values())[:10]}."
        )
    splits = []
    for value in sorted(wanted, key=lambda v: (isinstance(v, str), v)):
        test = chosen & (adata.obs[dose_key] == value).to_numpy()
        name = names[value]
        split = _make(
            ~test,
            test,
            label + "|" + dose,
            val_fraction,
            name=f"dose={name}",
            kind="unseen_dose",
            held_out=(name,),
            seed=seed,
            val_seed=seed,
        )
        split.check_held_out(np.where(chosen, dose, ""), separator=None)
        splits.append(split)
    return splits


def held_out_cells(
    adata: AnnData,
    *,
    perturbation_key: str,
    context_key: str | None = None,
    fraction: float = 0.2,
    n_splits: int = 1,
    val_fraction: float = 0.0,
    seed: int = 0,
) -> list[Split]:
    """Hold out a fraction of the cells of every perturbation (and context): nothing is new but the cells.

    Parameters
    ----------
    adata
        The cells, controls included.
    perturbation_key, context_key
        Columns of ``adata.obs`` that define the strata. A stratum of one cell stays in train.
    fraction
        Share of each stratum to hold out.
    n_splits
        Number of random splits.
    val_fraction
        Part of the training rows for validation, in the same strata.
    seed
        Of the first split; split i uses ``seed + i``.
    """
    strata = _column(adata, perturbation_key, "perturbation_key")
    if context_key is not None:
        strata = strata + "|" + _column(adata, context_key, "context_key")
    rows = np.arange(adata.n_obs)
    splits = []
    for s in range(seed, seed + n_splits):
        test = _pick(rows, strata, _fraction(fraction, "fraction"), np.random.default_rng(s))
        splits.append(
            _make(~test, test, strata, val_fraction, name=f"seed={s}", kind="held_out_cells", seed=s, val_seed=s)
        )
    return splits
