"""Checks of what a user asks a model: each error names the argument, what was found and what to do."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scvi import settings

from pertura.data._perturbation import Perturbation, tells_doses
from pertura.priors._drug_names import plain, synonyms

from ._protocol import Model
from ._registered import Registered


def check_flag(name: str, value: Any) -> None:
    """Raise unless an argument is true or false."""
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"`{name}` must be True or False, got {value!r}.")


def check_whole(name: str, value: Any, least: int = 1) -> None:
    """Raise unless an argument is a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise ValueError(f"`{name}` must be a whole number of at least {least}, got {value!r}.")


def check_number(
    name: str, value: Any, *, least: float | None = None, above: float | None = None, below: float | None = None
) -> None:
    """Raise unless an argument is a finite number, not smaller than `least`, above `above` and below `below`."""
    number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool) and np.isfinite(value)
    inside = number and (
        (least is None or value >= least) and (above is None or value > above) and (below is None or value < below)
    )
    if not inside:
        limits = [("of at least", least), ("above", above), ("below", below)]
        wanted = " and ".join(f"{word} {limit:g}" for word, limit in limits if limit is not None)
        raise ValueError(f"`{name}` must be a number {wanted}, got {value!r}.")


def check_widths(name: str, value: Any) -> None:
    """Raise unless an argument is a sequence of layer widths, which may be empty."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ValueError(f"`{name}` must be a sequence of whole numbers, the widths of layers, got {value!r}.")
    for width in value:
        check_whole(name, width)


def check_draws(n_samples: Any, ci: Any, batch_size: Any) -> None:
    """Raise unless number of draws, level of the interval and cells read at a time are possible."""
    if n_samples is not None:
        check_whole("n_samples", n_samples)
    if ci is not None and (isinstance(ci, bool) or not isinstance(ci, (int, float, np.number)) or not 0 < ci < 1):
        raise ValueError(f"`ci` must be between 0 and 1 (0.9 is a 90 % interval), or None, got {ci!r}.")
    if n_samples is None:
        n_samples = 2
    if ci is not None and n_samples < 2:
        raise ValueError(f"`ci` needs at least 2 draws, but `n_samples` is {n_samples}. Raise it or pass `ci=None`.")
    if batch_size is not None:
        check_whole("batch_size", batch_size)


def check_key(key: Any) -> str:
    """The key, if AnnData and h5ad can have it."""
    if not isinstance(key, str) or not key or "/" in key:
        raise ValueError(f"`key_added` must be a string without '/', which h5ad can not store, got {key!r}.")
    return key


def as_rows(n_cells: int, indices: Any) -> NDArray[np.int64]:
    """Rows of the cells asked."""
    if indices is None:
        return np.arange(n_cells)
    rows = np.asarray(indices)
    if rows.dtype == bool and rows.shape == (n_cells,):
        rows = np.flatnonzero(rows)
    if rows.ndim != 1 or (rows.size and not np.issubdtype(rows.dtype, np.integer)):
        raise ValueError(f"`indices` must be row numbers, or a boolean for each of the {n_cells} cells.")
    if not len(rows) or rows.min() < 0 or rows.max() >= n_cells:
        found = f"{rows.min()} to {rows.max()}" if len(rows) else "none"
        raise ValueError(f"`indices` must be between 0 and {n_cells - 1} and not empty, got {found}.")
    if len(np.unique(rows)) < len(rows):
        raise ValueError("`indices`: a cell was named twice.")
    return rows.astype(np.int64)


def resolve_scale(registered: Registered, scale: str | None) -> str:
    """Scale of a prediction: ``"log1p"``, ``"counts"`` or ``"layer"``."""
    if scale is None:
        return registered.default_scale
    if scale not in ("log1p", "counts", "layer"):
        raise ValueError(f"`scale` must be 'log1p', 'counts' or 'layer', got {scale!r}.")
    if not registered.is_counts and scale != "layer":
        raise ValueError(
            f"`scale`: {scale!r} needs a model of counts, but the registered layer holds other values. "
            "Use scale='layer', or register the counts."
        )
    return "counts" if registered.is_counts and scale == "layer" else scale


def resolve_seed(seed: int | None) -> int:
    """The seed given, else that of scvi-tools, else 0."""
    if seed is None:
        return settings.seed if settings.seed is not None else 0
    check_whole("seed", seed, least=0)
    return int(seed)


def resolve_perturbations(model: Model, perturbation: Any, dose: Any, *, every: bool = False) -> list[Perturbation]:
    """Every perturbation at every dose, as a user gives them.

    Parameters
    ----------
    model
        Model that is asked.
    perturbation, dose
        As given.
    every
        What `None` means: all that the model was trained on, or the only one there is.
    """
    vocabulary = model.vocabulary
    if perturbation is None:
        known = vocabulary.labels
        if every:
            known = [label for label in known if model._discrepancy.step(Perturbation(label)) == "seen"]
        if not known or (len(known) > 1 and not every):
            names = ", ".join(known[:8]) + (", …" if len(known) > 8 else "")
            raise ValueError(
                f"`perturbation`: the model knows {len(known)} ({names or 'none'}). Name one, or a list of them."
            )
        perturbation = known
    labels = [perturbation] if isinstance(perturbation, str) else perturbation
    if (
        not isinstance(labels, (list, tuple, np.ndarray))
        or not len(labels)
        or not all(isinstance(label, str) for label in labels)
    ):
        raise ValueError(f"`perturbation` must be a name or a non-empty list of names, got {perturbation!r}.")
    doses = _doses(model, dose)
    lookup = vocabulary.lookup
    # a dose of 1 may be a trace or an overdose: of a perturbation without doses of its own, what is usual here is asked
    usual = float(np.median(vocabulary.reference_dose)) if vocabulary.has_dose else 1.0
    found = []
    for label in labels:
        model._check_representable(label)
        members = vocabulary.parse(label)
        for value in doses:
            reference = [vocabulary.reference_dose[lookup[m]] if m in lookup else usual for m in members]
            each = tuple(reference if value is None else [value] * len(members))
            found.append(Perturbation(vocabulary.canonical(label), each))
    asked = [(p.label, p.dose_text) for p in found]
    twice = (
        next((one for i, one in enumerate(asked) if one in asked[:i]), None) if len(set(asked)) < len(asked) else None
    )
    if twice is not None:
        at = f" at dose {twice[1]}" if tells_doses(vocabulary, found) else ""
        raise ValueError(
            f"`perturbation` and `dose`: {twice[0]!r}{at} was asked twice (doses are told apart by six digits). "
            "Name each once."
        )
    return found


def _doses(model: Model, dose: Any) -> list[float | None]:
    if dose is None:
        return [None]
    try:
        doses = np.atleast_1d(np.asarray(dose, dtype=float))
    except (TypeError, ValueError):
        doses = np.array([np.nan])
    if doses.ndim != 1 or not len(doses) or not np.isfinite(doses).all() or (doses < 0).any():
        raise ValueError(f"`dose` must be a finite number that is not negative, or several, got {dose!r}.")
    # where a perturbation is a knock-out, a dose without unit is the share of it
    if not model.vocabulary.has_dose and not model._only_genes:
        raise ValueError(
            f"`dose`: {dose!r} was asked, but the model was registered without doses. "
            "Leave `dose` out, or set the data up with `dose_key`."
        )
    return doses.tolist()


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """A hint at another spelling or another name of a drug; empty where none is likely.

    Genes and compounds that differ in a number are different ones: ``IRF2`` is no slip of the pen for ``IRF1``.
    """
    spelled = {plain(k): k for k in known}
    close = [spelled[n] for n in (plain(name), *synonyms(name)) if n in spelled]
    near = [k for k in known if re.findall(r"\d+", k) == re.findall(r"\d+", name)]
    close = [k for k in (*close, *get_close_matches(name, near, n=1)) if k != name]
    return f" Did you mean {close[0]!r}?" if close else ""


def check_representable(model: Model, label: str) -> None:
    """Raise where a model has no way to represent a perturbation."""
    vocabulary, discrepancy = model.vocabulary, model._discrepancy
    step = discrepancy.step(Perturbation(label))
    if step != "unseen" and (step != "unseen with features" or model._can_predict_features):
        return
    trained = discrepancy.trained
    new = [m for m in vocabulary.parse(label) if m not in set(trained)]
    hint = did_you_mean(new[0], trained)
    name = type(model).__name__
    remedy = (
        "Register descriptions of perturbations, this one included, with `perturbation_features_key`."
        if model._can_predict_features
        else f"{name} can not represent a new perturbation; PertVAE or baseline.Linear with "
        "`perturbation_features_key` can."
    )
    if model._only_genes:
        remedy = (
            f"{name} knocks out genes of its data; PertVAE or baseline.Linear with "
            "`perturbation_features_key` predict other perturbations."
        )
    without = " and has no features" if step == "unseen" and vocabulary.features is not None else ""
    raise ValueError(
        f"`perturbation`: {', '.join(map(repr, new))} was not seen in training{without} "
        f"(known: {', '.join(trained[:8])}{', …' if len(trained) > 8 else ''}).{hint} {remedy}"
    )
