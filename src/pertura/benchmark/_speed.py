"""Training throughput beside a bare PyTorch loop of the same networks, in the same process and at the same time."""

from __future__ import annotations

import copy
import time
from contextlib import suppress
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from pertura.data._constants import KEYS
from pertura.module import SAMSVAE as Module

from ._dataset import Dataset
from ._runner import quiet

_WARM_UP = 10


def run_speed(data: Any = "papalexi", *, n_steps: int = 200, batch_size: int = 256, **options: Any) -> pd.DataFrame:
    """Time training steps of SAMSVAE, each followed by a step of a bare loop with a copy of its networks.

    The bare loop draws a minibatch from a dense tensor in memory, evaluates the same negative ELBO (one draw, written out with
    :mod:`torch.distributions`), clips gradients and steps Adam; no Pyro, Lightning, AnnData or logging. Steps alternate, so that whatever
    else the machine does slows both.

    Parameters
    ----------
    data
        What :func:`~pertura.benchmark.run` takes.
    n_steps
        Steps of each, after some that are not counted.
    batch_size
        Cells per step.
    **options
        Options of :class:`~pertura.model.SAMSVAE`, with latent effects; not those that change the ELBO beyond the mean-field
        guide.

    Returns
    -------
    One row: ``model``, ``batch_size``, ``n_genes``, median milliseconds per step of ``model_ms`` and ``bare_ms``, training cells per
    second of both, and ``ratio`` with the quartiles of the ratio of neighboring steps.
    """
    from pertura.model import SAMSVAE

    dataset = Dataset.of(data)
    # the bare loop knows one perturbation per cell
    adata = dataset.rows(np.flatnonzero(np.char.find(dataset.labels, "+") < 0))
    SAMSVAE.setup_anndata(adata, **dataset.keys)
    model = SAMSVAE(adata, effects="latent", **options)
    timer = _Alternate(model, batch_size, n_steps)
    n_batches = max(1, round(adata.n_obs / batch_size))
    with quiet(), suppress(_Enough):
        model.train(
            max_epochs=int(np.ceil((n_steps + _WARM_UP) / n_batches)),
            batch_size=batch_size,
            accelerator="cpu",
            enable_progress_bar=False,
            callbacks=[timer],
        )
    own, bare = np.array(timer.seconds).T[:, _WARM_UP:]
    low, ratio, high = np.quantile(own / bare, [0.25, 0.5, 0.75])
    return pd.DataFrame(
        {
            "model": ["SAMSVAE"],
            "batch_size": batch_size,
            "n_genes": adata.n_vars,
            "model_ms": 1e3 * np.median(own),
            "bare_ms": 1e3 * np.median(bare),
            "model_cells_per_s": batch_size / np.median(own),
            "bare_cells_per_s": batch_size / np.median(bare),
            "ratio": ratio,
            "ratio_low": low,
            "ratio_high": high,
        }
    )


class _Enough(Exception):
    """All steps were timed; what comes after training is not."""


class _Alternate(Callback):
    """After each training step a bare one; what is between two callbacks is the model's, loading included."""

    def __init__(self, model: Any, batch_size: int, n_steps: int) -> None:
        self.model, self.batch_size, self.n_steps = model, batch_size, n_steps
        self.seconds: list[tuple[float, float]] = []

    def on_train_start(self, trainer: Any, *args: Any) -> None:
        batches = list(trainer.train_dataloader)
        tensors = {
            name: torch.cat([b[name] for b in batches])
            for name in (KEYS.X, KEYS.LIBRARY, KEYS.PERTURBATION, KEYS.BATCH)
        }
        self.bare = BareLoop(copy.deepcopy(self.model.module), tensors, self.batch_size)
        self.start = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        now = time.perf_counter()
        own = now - self.start
        self.bare.step()
        self.start = time.perf_counter()
        self.seconds.append((own, self.start - now))
        if len(self.seconds) >= self.n_steps + _WARM_UP:
            raise _Enough


class BareLoop:
    """SAMS-VAE with mean-field and correlated guides, one perturbation per cell and a count likelihood, without any framework.

    Parameters
    ----------
    module
        Networks and parameters; trained further.
    tensors
        All cells, as a loader gives them.
    batch_size
        Cells per step.
    """

    def __init__(self, module: Module, tensors: dict[str, Tensor], batch_size: int) -> None:
        shifts = module.shifts
        plain = shifts.masked and not shifts.correlated and module.gene_effects is None
        if not plain or module.native_scale != "counts" or shifts.from_features is not None:
            raise ValueError(
                "`options`: the bare loop is that of sparse latent effects with a mean-field guide on counts."
            )
        self.module, self.batch_size = module, batch_size
        self.x, self.library = tensors[KEYS.X], tensors[KEYS.LIBRARY]
        self.code = tensors[KEYS.PERTURBATION][:, 0].long()
        self.batch = tensors[KEYS.BATCH].long().flatten()
        self.optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)

    def loss(self, rows: Tensor) -> Tensor:
        """Negative ELBO per cell of one minibatch."""
        m, shifts, x, code = self.module, self.module.shifts, self.x[rows], self.code[rows]
        batch = m.one_hot_batch(self.batch[rows])
        noise = torch.rand_like(shifts.mask_logits).clamp(1e-6, 1 - 1e-6)
        soft = torch.sigmoid(shifts.mask_logits + noise.log() - (-noise).log1p())
        mask = (soft > 0.5).float() + soft - soft.detach()
        q_effect = torch.distributions.Normal(shifts.loc, shifts.log_sd.exp() + 1e-4, validate_args=False)
        effect = q_effect.rsample()
        p_effect = torch.distributions.Normal(0.0, shifts.log_prior_sd.exp(), validate_args=False)
        prior = shifts.prior_logits
        kl = mask * (shifts.mask_logits - prior) - F.softplus(shifts.mask_logits) + F.softplus(prior)
        kl = kl + q_effect.log_prob(effect) - p_effect.log_prob(effect)
        shift = (mask * effect)[code.clamp(min=0)] * (code >= 0)[:, None]
        q = m.encoder(m.standardized(x, self.library[rows]), batch, shift)
        z = q.rsample() - shift
        h = m.decoder(z + shift, batch)
        p_z = torch.distributions.Normal(0.0, 1.0, validate_args=False)
        local = m.likelihood(h, self.library[rows]).log_prob(x) + (p_z.log_prob(z) - q.log_prob(z + shift)).sum(-1)
        return -local.mean() + kl.sum() / len(self.x)

    def step(self) -> None:
        """One step of training."""
        rows = torch.randint(len(self.x), (self.batch_size,))
        self.optimizer.zero_grad(set_to_none=True)
        self.loss(rows).backward()
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), 100.0)
        self.optimizer.step()
