"""What a training step costs beside the same networks and densities without Pyro, Lightning and AnnData."""

from __future__ import annotations

import copy
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
import pyro
import torch
from lightning.pytorch.callbacks import Callback
from pyro.infer import TraceMeanField_ELBO
from torch import Tensor
from torch.distributions import kl_divergence

from pertura.data._cells import CellDataset
from pertura.module._base import Cells, PerturbationModule
from pertura.train import AdversarialPlan, PyroPlan

from ._dataset import Dataset
from ._phases import screen
from ._runner import quiet

_WARM_UP = 3
MODELS = ("SAMSVAE", "PertVAE", "CRADLEVAE", "GPOVAE", "CPA", "DrugAAE", "PerturbX", "InfoSEM")


def run_speed(
    data: Any = None,
    models: Sequence[str] = MODELS,
    *,
    n_cells: int = 4096,
    n_genes: int = 2000,
    n_perturbations: int = 50,
    batch_size: int = 512,
    n_steps: int = 30,
) -> pd.DataFrame:
    """Time training steps of models, each followed by a bare step on the same minibatch.

    The bare step evaluates guide and model of a copy of the module as plain functions, with the same estimator of the ELBO, clips
    gradients and steps the same optimizers. What the module itself computes is in both; tracing, logging, loading and all else
    that is no arithmetic on tensors is in one of them. Steps alternate, so that whatever else the machine does slows both.

    Parameters
    ----------
    data
        What :func:`~pertura.benchmark.run` takes; by default a simulated screen.
    models
        Names in :mod:`pertura.model`. `InfoSEM` has 300 regulators at most.
    n_cells, n_genes, n_perturbations
        Size of the simulated screen.
    batch_size
        Cells per step.
    n_steps
        Steps of each model that are timed, after some that are not.

    Returns
    -------
    One row per model: median milliseconds of a step, ``model_ms``, of which ``data_ms`` read the minibatch, ``gradient_ms`` were the loss
    and its gradient, and ``rest_ms`` all else (optimizer and Lightning); ``bare_ms`` and ``bare_gradient_ms`` of the bare step;
    the median ``ratio`` of both, with quartiles; training cells per second, ``cells_per_s``.
    """
    import pertura.model

    if data is None:
        adata = screen(n_cells, n_genes, n_perturbations)
        # some models look for the gene that a perturbation is on
        adata.obs["perturbation"] = adata.obs["perturbation"].astype(str).str.replace("P", "G")
        keys: dict[str, Any] = {"perturbation_key": "perturbation", "control": "control"}
    else:
        dataset = Dataset.of(data)
        adata, keys = dataset.rows(np.arange(dataset.adata.n_obs)), dataset.keys
    rows = []
    for name in models:
        cls = getattr(pertura.model, name)
        cls.setup_anndata(adata, **keys)
        model = cls(adata, **({"regulators": list(adata.var_names[:300])} if name == "InfoSEM" else {}))
        timer = Steps(n_steps + _WARM_UP)
        with quiet(), suppress(_Enough), timer.reading():
            options = {"batch_size": batch_size, "accelerator": "cpu", "enable_progress_bar": False}
            model.train(max_epochs=10_000, callbacks=[timer], **options)
        seconds = pd.DataFrame(timer.seconds)[_WARM_UP:]
        low, ratio, high = (seconds["model"] / seconds["bare"]).quantile([0.25, 0.5, 0.75])
        median = 1e3 * seconds.median()
        rows.append(
            {"model": name, "batch_size": batch_size, "n_genes": adata.n_vars}
            | {f"{part}_ms": median[part] for part in seconds}
            | {
                "ratio": ratio,
                "ratio_low": low,
                "ratio_high": high,
                "cells_per_s": 1e3 * timer.n_cells / median["model"],
            }
        )
    return pd.DataFrame(rows)


class _Enough(Exception):
    """All steps were timed; what comes after training is not."""


class Steps(Callback):
    """After each training step a bare one; what is between two callbacks is the model's, loading included."""

    def __init__(self, n_steps: int) -> None:
        self.n_steps, self.n_cells = n_steps, 0
        self.seconds: list[dict[str, float]] = []
        self._part: dict[str, float] = defaultdict(float)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Time every minibatch that is read."""
        with mock.patch.object(CellDataset, "__getitem__", self._timed("data", CellDataset.__getitem__)):
            yield

    def _timed(self, part: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            result = function(*args, **kwargs)
            self._part[part] += time.perf_counter() - began
            return result

        return call

    def on_train_start(self, trainer: Any, plan: PyroPlan) -> None:
        self.bare = BareLoop(plan, trainer.gradient_clip_val)
        for name in ("loss_per_cell", "discriminator_loss"):
            if hasattr(plan, name):
                setattr(plan, name, self._timed("gradient", getattr(plan, name)))
        self._began = time.perf_counter()

    def on_before_backward(self, *args: Any) -> None:
        self._backward = time.perf_counter()

    def on_after_backward(self, *args: Any) -> None:
        self._part["gradient"] += time.perf_counter() - self._backward

    def on_train_batch_end(self, trainer: Any, plan: PyroPlan, outputs: Any, batch: dict, batch_idx: int) -> None:
        now = time.perf_counter()
        own = now - self._began
        self.n_cells = len(batch["X"])
        gradient = self.bare.step(batch, plan)
        bare = time.perf_counter() - now
        parts = {name: self._part[name] for name in ("data", "gradient")}
        self._part.clear()
        rest = own - sum(parts.values())
        self.seconds.append({"model": own, **parts, "rest": rest, "bare": bare, "bare_gradient": gradient})
        if len(self.seconds) >= self.n_steps:
            raise _Enough
        self._began = time.perf_counter()


class BareLoop:
    """Training of a copy of a plan's module, without any framework."""

    def __init__(self, plan: PyroPlan, clip: float | None) -> None:
        self.module, self.clip = copy.deepcopy(plan.module), clip
        optimizers = plan.optimizers()
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        # the same groups and settings, with the copies of their parameters
        twin = dict(zip(map(id, plan.module.parameters()), self.module.parameters(), strict=True))
        self.optimizers = []
        for lightning in optimizers:
            own = lightning.optimizer
            groups = [{**g, "params": [twin[id(p)] for p in g["params"]]} for g in own.param_groups]
            self.optimizers.append(type(own)(groups))
        loss = plan.loss_fn
        self.elbo = Elbo(isinstance(loss, TraceMeanField_ELBO), getattr(loss, "free_nats", {}))

    def step(self, batch: dict[str, Any], plan: PyroPlan) -> float:
        """One step of training; the seconds of loss and gradient."""
        batch = {name: value.clone() if isinstance(value, Tensor) else value for name, value in batch.items()}
        if hasattr(self.module, "on_step"):
            self.module.on_step(plan.annealing)
        args, kwargs = self.module._get_fn_args_from_batch(batch)
        kwargs = {**kwargs, "kl_weight": plan.kl_weight} if plan.use_kl_weight else kwargs
        began = time.perf_counter()
        self.optimizers[0].zero_grad()
        with pyro.validation_enabled(False):
            (self.elbo.loss(self.module, args, kwargs) / len(batch["X"])).backward()
        seconds = time.perf_counter() - began
        self._move(self.optimizers[0])
        if isinstance(plan, AdversarialPlan):
            cells = Cells.from_tensors(batch)
            with torch.no_grad():
                given = self.module.discriminator_input(cells)
            for _ in range(plan.n_discriminator_steps):
                began = time.perf_counter()
                self.optimizers[1].zero_grad()
                with mock.patch.object(plan, "module", self.module):
                    type(plan).discriminator_loss(plan, given, cells).backward()
                seconds += time.perf_counter() - began
                self._move(self.optimizers[1])
        return seconds

    def _move(self, optimizer: torch.optim.Optimizer) -> None:
        if self.clip is not None:
            torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], self.clip)
        optimizer.step()


class Elbo:
    """The negative ELBO of a guide and a model whose sites are evaluated as they are met: no messengers, no trace.

    Parameters
    ----------
    closed
        Whether divergences are in closed form.
    free_nats
        As in :class:`~pertura.train.FreeBitsELBO`.
    """

    def __init__(self, closed: bool, free_nats: Mapping[str, float]) -> None:
        self.closed, self.free_nats = closed, free_nats

    def loss(self, module: PerturbationModule, args: Any, kwargs: Any) -> Tensor:
        """Of one minibatch, summed over its cells."""
        self.scale, self.total, self.guide, self.rows = 1.0, 0.0, {}, {}
        own = {"sample": self._sample, "factor": self._factor, "plate": self._plate, "deterministic": _value}
        with mock.patch.multiple(pyro, **own), mock.patch.object(pyro.poutine, "scale", self._scaled):
            self.guiding = True
            module.guide(*args, **kwargs)
            self.guiding = False
            module.model(*args, **kwargs)
        return -self.total

    def _add(self, log_prob: Tensor, sign: float = 1.0) -> None:
        self.total = self.total + sign * (self.scale * log_prob).sum()

    def _sample(self, name: str, fn: Any, *_: Any, obs: Tensor | None = None, **__: Any) -> Tensor:
        if obs is not None:
            self._add(fn.log_prob(obs))
            return obs
        if self.guiding:
            value = fn.rsample() if fn.has_rsample else fn.sample()
            self.guide[name] = fn, value, self.scale
            return value
        q, value, scale = self.guide[name]
        if self.closed:
            with suppress(NotImplementedError):
                divergence = kl_divergence(q, fn)
                self._add(-divergence)
                return value
        log_q, log_p = (scale * q.log_prob(value)).sum(), self.scale * fn.log_prob(value)
        divergence = log_q - log_p.sum()
        if name in self.free_nats:
            divergence = divergence.clamp(min=self.free_nats[name] * log_p.numel() * float(self.scale))
        self.total = self.total - divergence
        return value

    def _factor(self, name: str, log_factor: Tensor, **_: Any) -> None:
        self._add(log_factor, -1.0 if self.guiding else 1.0)

    @contextmanager
    def _scaled(self, scale: Any) -> Iterator[None]:
        before, self.scale = self.scale, self.scale * scale
        try:
            yield
        finally:
            self.scale = before

    def _plate(self, name: str, size: int, subsample_size: int | None = None, **_: Any) -> _Plate:
        n = subsample_size or size
        if name not in self.rows:
            self.rows[name] = torch.arange(size) if n == size else torch.randperm(size)[:n]
        return _Plate(self._scaled, size / n, self.rows[name])


class _Plate:
    """Rows of a plate, which may be entered more than once."""

    def __init__(self, *scaled: Any) -> None:
        self.scaled, self.factor, self.rows = scaled

    def __enter__(self) -> Tensor:
        self._inside = self.scaled(self.factor)
        self._inside.__enter__()
        return self.rows

    def __exit__(self, *error: Any) -> None:
        self._inside.__exit__(*error)


def _value(name: str, value: Tensor, event_dim: int | None = None) -> Tensor:
    return value
