"""One table of every score, so that a benchmark, a gap and a plot agree on which direction is better."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd

Needs = Literal["mean", "cells", "draws", "table", "network"]
"""What a metric reads: mean profiles, cells, draws or intervals, a conditions x genes table, a network."""

DEFAULT_TOP = 100


@dataclass(frozen=True)
class Metric:
    """A score, with what one needs to know to compare two values of it.

    Parameters
    ----------
    name
        Key in :data:`METRICS`.
    best_value
        Value of a perfect prediction; ``None`` for a property of the data that has none.
    higher_is_better
        ``None`` where the best value lies inside the range (a ratio of variances is best at 1).
    needs
        What the function reads: ``"mean"``, ``"cells"``, ``"draws"``, ``"table"`` or ``"network"``.
    function
        The function; calling the metric calls it.
    doc
        One line.
    duplicate
        How a value between two halves of the cells extends to two full-size samples: ``"spearman_brown"``
        (correlations), ``"half"`` (squared errors of means) or ``None`` (no such rule).
    """

    name: str
    best_value: float | None
    higher_is_better: bool | None
    needs: Needs
    function: Callable[..., Any]
    doc: str
    duplicate: Literal["spearman_brown", "half"] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the metric's function."""
        return self.function(*args, **kwargs)

    @property
    def parameters(self) -> frozenset[str]:
        """Names of the function's parameters."""
        return frozenset(inspect.signature(self.function).parameters)

    @property
    def required(self) -> frozenset[str]:
        """Names of the function's parameters that have no default."""
        kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        parameters = inspect.signature(self.function).parameters.values()
        return frozenset(p.name for p in parameters if p.default is p.empty and p.kind not in kinds)

    def orient(self, value: Any) -> Any:
        """Turn values so that larger is better (minus the distance to a best value inside the range)."""
        if self.higher_is_better is None:
            if self.best_value is None:
                raise ValueError(
                    f"metric {self.name!r} describes the data and has no best value; it cannot be compared."
                )
            return -np.abs(value - self.best_value)
        return value if self.higher_is_better else -value


METRICS: dict[str, Metric] = {}
"""Every registered metric by name."""


def register(
    name: str | None = None,
    *,
    best_value: float | None,
    higher_is_better: bool | None,
    needs: Needs,
    duplicate: Literal["spearman_brown", "half"] | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add a function to :data:`METRICS`.

    Parameters
    ----------
    name
        Key; default the function's name.
    best_value, higher_is_better, needs, duplicate
        See :class:`Metric`.

    Returns
    -------
    A decorator that returns the function unchanged.

    Raises
    ------
    ValueError
        If `name` is taken or `needs` is not one of the five kinds.
    """
    if needs not in get_args(Needs):
        raise ValueError(f"`needs` must be one of {get_args(Needs)}, got {needs!r}.")

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        inner = function.func if isinstance(function, partial) else function
        key = name or inner.__name__
        if key in METRICS:
            raise ValueError(f"`name`: a metric {key!r} is already registered; choose another name.")
        doc = (inspect.getdoc(inner) or "").split("\n", 1)[0]
        METRICS[key] = Metric(key, best_value, higher_is_better, needs, function, doc, duplicate)
        return function

    return decorate


def get_metric(name: str | Metric, *, top: int = DEFAULT_TOP) -> Metric:
    """Look a metric up by name.

    Parameters
    ----------
    name
        A key of :data:`METRICS`, or such a key followed by ``"_top"`` or ``"_top<k>"`` for a metric that has
        the argument `top`: ``"r2_top"`` is R2 on the `top` genes of largest true effect, ``"r2_top20"`` on
        20. A :class:`Metric` is returned as it is.
    top
        Number of genes meant by ``"_top"``.

    Raises
    ------
    ValueError
        If there is no such metric, or it knows no `top`.
    """
    if isinstance(name, Metric):
        return name
    if name in METRICS:
        return METRICS[name]
    match = re.fullmatch(r"(\w+?)_top(\d*)", name)
    base = METRICS.get(match.group(1)) if match else None
    if match is None or base is None or "top" not in base.parameters:
        raise ValueError(
            f"`metrics`: there is no metric {name!r}; choose from {sorted(METRICS)} "
            "(a name with an argument `top` also takes the suffix '_top' or '_top<k>')."
        )
    k = int(match.group(2)) if match.group(2) else top
    return replace(
        base,
        name=name,
        function=partial(base.function, top=k),
        doc=f"{base.doc} On the {k} genes of largest effect.",
    )


def list_metrics(needs: Needs | None = None) -> pd.DataFrame:
    """Table of the registered metrics.

    Parameters
    ----------
    needs
        Keep only the metrics that read this.

    Returns
    -------
    DataFrame indexed by name with columns ``needs, best_value, higher_is_better, duplicate, doc``.
    """
    if needs is not None and needs not in get_args(Needs):
        raise ValueError(f"`needs` must be one of {get_args(Needs)} or None, got {needs!r}.")
    rows = {
        m.name: {
            "needs": m.needs,
            "best_value": m.best_value,
            "higher_is_better": m.higher_is_better,
            "duplicate": m.duplicate,
            "doc": m.doc,
        }
        for m in METRICS.values()
        if needs is None or m.needs == needs
    }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("name")
