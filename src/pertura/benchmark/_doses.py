"""A dose that nobody measured, between two that were: DrugAAE beside linear interpolation in log dose."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ._compounds import ask_drugaae, fit_drugaae, score_effects
from ._screens import Screen

logger = logging.getLogger(__name__)


def run_doses(
    screen: Screen,
    *,
    dose: float = 0.2,
    seeds: int | Sequence[int] = 5,
    model: Mapping[str, Any] | None = None,
    train: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
) -> pd.DataFrame:
    """Predict a dose that is held out of all compounds and contexts from the doses below and above it.

    Asked are compounds that were measured at the dose and at both others. Neither descriptions nor hyper-parameters enter.

    Parameters
    ----------
    screen
        With doses, such as :func:`tggates_conditions`.
    dose
        Dose that is held out.
    seeds
        Seeds of the model's training.
    model, train
        Arguments of :class:`pertura.model.DrugAAE` and its ``train``; ``model=None`` leaves it out.
    out
        CSV that grows, seed by seed; what is in it is not run again.

    Returns
    -------
    One row per seed, condition, compound and method, as of :func:`run_compounds` (``description`` is ``"other doses"``).

    Raises
    ------
    ValueError
        If there is no such dose, or none below or above it.
    """
    doses = sorted({d for d, _ in screen.asked.values() if d is not None})
    if dose not in doses[1:-1]:
        raise ValueError(f"`dose` must be one that has others below and above it, got {dose!r} (doses: {doses}).")
    below, above = doses[doses.index(dose) - 1], doses[doses.index(dose) + 1]
    names = {v: k for k, v in screen.asked.items()}
    held_out = [c for c, (d, _) in screen.asked.items() if d == dose]
    use = ~screen.adata.obs["condition"].astype(str).isin(held_out).to_numpy()
    path = None if out is None else Path(out)
    rows = [] if path is None or not path.exists() else pd.read_csv(path).to_dict("records")
    done = {r["seed"] for r in rows}
    for seed in range(seeds) if isinstance(seeds, int) else seeds:
        if seed in done:
            continue
        fitted = None if model is None else fit_drugaae(screen, use, None, seed=seed, model=model, train=train or {})
        for condition in held_out:
            context = screen.asked[condition][1]
            tables = [screen.effects[names[d, context]] for d in (below, above)]
            effect = screen.effects[condition]
            compounds = [n for n in effect.index if all(n in t.index for t in tables)]
            if not compounds:
                continue
            measured = [t.loc[compounds].to_numpy() for t in (*tables, effect)]
            predicted = {
                f"copy of {names[below, context]}": measured[0],
                f"copy of {names[above, context]}": measured[1],
                "interpolation in log dose": interpolate(measured[0], measured[1], below, above, dose),
            }
            if fitted is not None:
                predicted["DrugAAE"] = ask_drugaae(fitted, screen, condition, compounds)
            keys = {"description": "other doses", "seed": seed, "fold": 0, "condition": condition}
            for method, values in predicted.items():
                for row in score_effects(method, compounds, values, measured[-1]):
                    rows.append({**keys, **row, "reproducible": screen.reproducible.get(row["compound"])})
        logger.info("seed %d", seed)
        if path is not None:
            pd.DataFrame(rows).to_csv(path, index=False)
    return pd.DataFrame(rows)


def interpolate(low: NDArray, high: NDArray, below: float, above: float, dose: float) -> NDArray[np.float64]:
    """Effects at a dose on the line, in log dose, between those at two others."""
    share = np.log(dose / below) / np.log(above / below)
    return (1.0 - share) * low + share * high
