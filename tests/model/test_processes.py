"""Training by two processes on one machine, which are forked rather than started: nothing is imported anew."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from .conftest import MODELS

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked")
DDP = {"devices": 2, "strategy": "ddp_find_unused_parameters_true"}
BATCH = 64


def train(spec: Any, adata: Any, batch_size: int, **arguments: Any) -> Any:
    model = spec.make(adata)
    # the weight of the divergences is 1 from the start: a wrong share of global terms shows
    options = {} if spec.name == "model.PerturbX" else {"plan_kwargs": {"min_kl_weight": 1.0}}
    return spec.fit(model, **{"max_epochs": 4, "batch_size": batch_size, "seed": 0, **options, **arguments})


def losses(model: Any) -> np.ndarray:
    return model.history["elbo_train"].to_numpy(float).ravel()


def check_losses(loss: np.ndarray, expected: np.ndarray) -> None:
    assert len(loss) == len(expected)
    np.testing.assert_allclose(loss, expected, rtol=0.06, atol=0.1 * abs(expected[0] - expected[-1]))


def compare(spec: Any, adata: Any, path: Any, fork: Any) -> None:
    """Two processes end with one set of weights, and with the losses of one process that has the doubled minibatches."""
    spec.setup(adata)
    alone = train(spec, adata, BATCH)

    def together(rank: int) -> Any:
        model = train(spec, adata, BATCH // 2, **DDP)
        sampler = model.trainer.datamodule._train
        rows = [batch.rows[batch.n_pairs :] for batch in sampler]
        model.save(path / "model")
        saved = spec.cls.load(path / "model", adata=False)  # by all, and whole
        assert saved.is_trained_ and model.module.n_train == adata.n_obs  # which weighs global terms
        return model.module.state_dict(), rows, losses(model) if rank == 0 else None

    codes, found = fork(together)
    assert codes == [0, 0]
    (one, rows, loss), (two, others, _) = found
    assert [name for name in one if not torch.equal(one[name], two[name])] == []
    check_losses(loss, losses(alone))
    if spec.name == "model.PerturbX":
        return  # draws its cells with replacement
    rows, others = set(np.concatenate(rows)), set(np.concatenate(others))
    treated = set(np.flatnonzero(adata.obs["perturbation"] != "control"))
    assert not rows & others and len(treated & (rows | others)) > 0.9 * len(treated)


def test_two_processes_are_one_with_the_doubled_minibatch(gradient_spec, screen, tmp_path, fork):
    compare(gradient_spec, screen(), tmp_path, fork)


def test_a_killed_process_ends_the_others(screen, fork):
    spec, adata = next(spec for spec in MODELS if spec.name == "model.SAMSVAE"), screen()
    spec.setup(adata)

    class Kill(Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_rank == 1 and trainer.global_step == 3:
                os.kill(os.getpid(), signal.SIGKILL)

    def target(rank: int) -> None:
        with pytest.raises(RuntimeError, match="onnection|peer"):
            train(spec, adata, BATCH // 2, callbacks=[Kill()], **DDP)

    codes, _ = fork(target, timeout=60)
    assert codes == [0, -signal.SIGKILL]


def test_default_epochs_count_steps_of_all_processes(screen, fork):
    spec, adata = next(spec for spec in MODELS if spec.name == "model.SAMSVAE"), screen()
    spec.setup(adata)

    def epochs(batch_size: int, **arguments: Any) -> int:
        return train(spec, adata, batch_size, max_epochs=None, max_steps=1, **arguments).trainer.max_epochs

    expected = epochs(BATCH)
    assert fork(lambda rank: epochs(BATCH // 2, **DDP)) == ([0, 0], [expected, expected])
