"""Runs of a Pyro program with many draws at once: antithetic pairs, fixed values, and noise that is replayed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pyro
import pyro.poutine.util
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch import distributions as td


def unwrapped(fn: Any) -> Any:
    """Distribution of single coordinates, below event dimensions, masks and expansion."""
    while hasattr(fn, "base_dist") and not isinstance(fn, td.TransformedDistribution):
        fn = fn.base_dist
    return fn


def noise_of(site: Mapping[str, Any]) -> Tensor:
    """Standardized value of a normal variable; of any other variable its value."""
    fn = unwrapped(site["fn"])
    if isinstance(fn, td.Normal):
        return (site["value"] - fn.loc) / fn.scale
    return site["value"]


class _Draws(Messenger):
    """Sets the values of latent sites; the first dimension of a value is the draw."""

    def __init__(self, n_draws: int, values: Mapping[str, Tensor], noise: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.n_draws, self.values, self.noise = n_draws, values, noise

    def _pyro_sample(self, msg: Any) -> None:
        if msg["done"] or msg["is_observed"] or pyro.poutine.util.site_is_subsample(msg):
            return
        name, fn = msg["name"], msg["fn"]
        if name in self.values:
            msg["value"] = self.values[name]
        elif name in self.noise:
            own = unwrapped(fn)
            noise = self.noise[name]
            msg["value"] = own.loc + own.scale * noise if isinstance(own, td.Normal) else noise
        else:
            msg["value"] = self._antithetic(fn)
        msg["done"] = True

    def _antithetic(self, fn: Any) -> Tensor:
        """Draws in pairs whose normal deviates are each other's negative: errors of first order cancel."""
        own = unwrapped(fn)
        steps = []
        if isinstance(own, td.TransformedDistribution):
            steps, own = own.transforms, unwrapped(own.base_dist)
        shape = fn.batch_shape + fn.event_shape
        if not isinstance(own, td.Normal) or self.n_draws < 2 or shape[:1] != (self.n_draws,):
            return fn.sample()
        loc, scale = own.loc, own.scale
        half = torch.randn((self.n_draws + 1) // 2, *shape[1:], device=loc.device, dtype=loc.dtype)
        value = loc + scale * torch.cat([half, -half])[: self.n_draws]
        for step in steps:
            value = step(value)
        return value


def run(
    program: Callable[..., Any],
    cells: Any,
    n_draws: int,
    values: Mapping[str, Tensor] | None = None,
    noise: Mapping[str, Tensor] | None = None,
) -> Trace:
    """Trace of a model or guide with a leading dimension of draws.

    Parameters
    ----------
    program
        Takes `cells`.
    n_draws
        Number of draws.
    values
        Values of sites that are not drawn.
    noise
        Noise, as :func:`noise_of` gives it, of sites whose value follows from it and from the distribution they have
        now.
    """
    with (
        torch.no_grad(),
        pyro.validation_enabled(False),
        pyro.poutine.trace() as tracer,
        _Draws(n_draws, values or {}, noise or {}),
        pyro.plate("draws", n_draws, dim=-2),
    ):
        program(cells)
    return tracer.trace


def is_latent(site: Mapping[str, Any]) -> bool:
    """Whether a site of a trace is a latent variable."""
    return site["type"] == "sample" and not site["is_observed"] and not pyro.poutine.util.site_is_subsample(site)


def is_local(site: Mapping[str, Any], plate: str = "cells") -> bool:
    """Whether there is one value for each cell."""
    return any(frame.name == plate for frame in site["cond_indep_stack"])


def expression_of(trace: Trace) -> Any:
    """Distribution of expression, genes in its batch shape."""
    return unwrapped(trace.nodes["x"]["fn"])
