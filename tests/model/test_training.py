"""What a user sees of training, and what is left when training is stopped."""

from __future__ import annotations

import logging
import os
import signal
import sys
import warnings

import lightning.pytorch as pl
import numpy as np
import pandas as pd
import pytest
import scvi
import torch
from lightning.pytorch.callbacks import TQDMProgressBar

from pertura import datasets
from pertura.model import SAMSVAE, PertVAE
from pertura.model.base import _train as training

N_EPOCHS = 4


@pytest.fixture(scope="module")
def screen():
    return datasets.simulate(
        n_cells_per_condition=20,
        n_genes=30,
        n_regulators=5,
        n_perturbations=2,
        n_contexts=2,
        n_unresponsive_contexts=0,
        n_biomarkers=2,
        n_truth_cells=10,
    )


def make(cls, screen):
    adata = screen.copy()
    keys = {"perturbation_key": "perturbation", "control": "control", "layer": "counts", "context_key": "cell_type"}
    cls.setup_anndata(adata, **keys)
    return cls(adata, n_latent=3)


@pytest.fixture
def model(screen):
    return make(SAMSVAE, screen)


class At(pl.Callback):
    """Does something in one step, once."""

    def __init__(self, action, epoch=1, batch=1, end=True):
        self.action, self.epoch, self.batch, self.end = action, epoch, batch, end

    def _meet(self, trainer, batch, end):
        if self.action and end == self.end and (trainer.current_epoch, batch) == (self.epoch, self.batch):
            action, self.action = self.action, None
            action()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self._meet(trainer, batch_idx, False)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self._meet(trainer, batch_idx, True)


def fit(model, max_epochs=N_EPOCHS, **options):
    options = {"accelerator": "cpu", "batch_size": 30, "enable_progress_bar": False, **options}
    model.train(max_epochs=max_epochs, **options)
    return model


def raise_interrupt():
    raise KeyboardInterrupt


def press():
    os.kill(os.getpid(), signal.SIGINT)


def n_batches(model):
    return len(model._data_module(np.arange(model.adata.n_obs), np.zeros(0, int), 30, 0).train_dataloader())


# -- stopping -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [press, raise_interrupt])
@pytest.mark.parametrize("cls", [SAMSVAE, PertVAE])
def test_stopped_model_keeps_what_it_has_learned(screen, cls, stop, capsys):
    model = make(cls, screen)
    untrained = {k: v.clone() for k, v in model.module.state_dict().items()}
    before = signal.getsignal(signal.SIGINT)
    share = 1 + 2 / n_batches(model)
    message = rf"stopped after {round(share, 1):g} of 4 epochs.*`train\(max_epochs=3\)` goes on"
    with pytest.warns(UserWarning, match=message):
        fit(model, callbacks=[At(stop)])
    assert signal.getsignal(signal.SIGINT) is before
    assert model.is_trained_ and not model.module.training
    assert model.calibration_ is not None, "effects are measured"
    assert len(model.history["elbo_train"]) == (2 if stop is press else 1), (
        "an exception leaves its epoch without a mean"
    )
    assert any(not torch.equal(v, untrained[k]) for k, v in model.module.named_parameters())
    assert len(model.train_indices) == model.adata.n_obs
    assert "Exception" not in "".join(capsys.readouterr())
    assert model.trainer.n_steps == n_batches(model) + 2
    model.predict_perturbation(model.vocabulary.names[0], n_samples=2)


def test_stopped_model_can_be_saved_and_trained_on(model, tmp_path):
    with pytest.warns(UserWarning, match="stopped"):
        fit(model, callbacks=[At(press)])
    model.save(tmp_path / "model")
    loaded = type(model).load(tmp_path / "model", adata=model.adata, accelerator="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        fit(loaded, 3)
    assert loaded.history["elbo_train"].index.tolist() == [0, 1, 2, 3, 4]


def test_stopped_before_the_first_step(model):
    with pytest.raises(KeyboardInterrupt):
        fit(model, callbacks=[At(raise_interrupt, epoch=0, batch=0, end=False)])
    assert not model.is_trained_
    with pytest.raises(RuntimeError, match="not trained"):
        model.predict_perturbation(model.vocabulary.names[0])


def test_two_interruptions_do_not_wait_for_the_step(model):
    def twice():
        press()
        press()
        pytest.fail("the second does not return")

    with pytest.warns(UserWarning, match="stopped after 1 of 4"):
        fit(model, callbacks=[At(twice, batch=0, end=False)])
    assert model.is_trained_


def test_interruption_while_effects_are_measured(model, monkeypatch):
    monkeypatch.setattr(training, "calibrate", lambda *_, **__: raise_interrupt())
    with pytest.warns(UserWarning, match="not measured"), pytest.raises(KeyboardInterrupt):
        fit(model, 1)
    assert model.is_trained_ and len(model.history["elbo_train"]) == 1
    assert not model._progress.__dict__.get("_bar")


def test_errors_are_raised_as_they_are(model, capsys):
    def fail():
        raise FloatingPointError("The loss became nan.")

    with pytest.raises(FloatingPointError, match=r"^The loss became nan\.$"):
        fit(model, callbacks=[At(fail)])
    assert not model.is_trained_
    assert "".join(capsys.readouterr()) == ""


def test_a_failure_of_later_training_leaves_a_trained_model(model):
    fit(model, 1)

    def leave():
        sys.exit(3)

    with pytest.raises(SystemExit) as left:
        fit(model, callbacks=[At(leave)])
    assert left.value.code == 3, "only what comes of an interruption is one"
    assert model.is_trained_


# -- what is shown ------------------------------------------------------------------------------------------------------


def frames(text):
    return [frame for line in text.split("\n") for frame in line.split("\r") if frame.strip()]


def test_one_bar_from_the_first_read_to_the_end(model, capsys):
    seen = []
    finish = type(model)._after_training

    def after(self, train_idx, table):
        for _ in self._progress.track(range(2), "Measuring things"):
            seen.append(self._progress._bar.n)
        finish(self, train_idx, table)

    model._after_training = after.__get__(model)
    fit(model, 2, enable_progress_bar=True)
    out, err = capsys.readouterr()
    shown = frames(out)
    assert out.count("\n") == 1 and err == "", "one line"
    stages = list(dict.fromkeys(frame.partition(":")[0] for frame in shown))
    assert [s for s in stages if s != "Epoch 1"] == [
        "Training",
        "Reading data",
        "Epoch 1/2",
        "Epoch 2/2",
        "Measuring effects",
        "Measuring things",
        "Trained 2 epochs",
    ]
    percent = [int(frame.partition(":")[2].partition("%")[0]) for frame in shown]
    assert percent == sorted(percent) and percent[-1] == 100
    assert f"elbo_train={float(model.history['elbo_train'].iloc[-1, 0]):.5g}" in shown[-1]
    assert 95 <= seen[0] < 100
    assert model._progress._bar is None
    model._progress.advance()  # outside training it does nothing


def test_steps_of_long_epochs_move_the_bar(model, monkeypatch):
    shown = []

    def look():
        model._progress._every = 0.0  # as if steps took long
        shown.append(0)

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            shown.append(model._progress._bar.n)

    fit(model, 1, enable_progress_bar=True, callbacks=[At(look, epoch=0, batch=0, end=False), Look()])
    moved = np.diff(shown[2:])
    assert len(moved) >= 2 and (moved > 0).all()
    np.testing.assert_allclose(moved, 90 / n_batches(model), rtol=1e-6)


@pytest.mark.parametrize(
    "options", [{"enable_progress_bar": False}, {"progress_bar_refresh_rate": 0}, {"verbosity": logging.ERROR}], ids=str
)
def test_nothing_is_shown(model, capfd, caplog, options):
    """Nor do the trainer and its loaders say anything, on any channel."""
    options = dict(options)
    before = scvi.settings.verbosity
    loggers = [logging.getLogger(name) for name in ("lightning", "lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    scvi.settings.verbosity = options.pop("verbosity", before)
    try:
        with warnings.catch_warnings(record=True) as caught, caplog.at_level(logging.INFO):
            warnings.simplefilter("always")
            fit(model, 1, **{"enable_progress_bar": True, **options})
    finally:
        scvi.settings.verbosity = before
    assert capfd.readouterr() == ("", "")
    assert [record.getMessage() for record in caplog.records if record.name.startswith("lightning")] == []
    assert [str(w.message) for w in caught] == []
    assert [logger.level for logger in loggers] == levels


def test_lightning_speaks_where_everything_is_asked_for(model, caplog, monkeypatch):
    before = scvi.settings.verbosity
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "propagate", True)
    scvi.settings.verbosity = logging.DEBUG
    try:
        with caplog.at_level(logging.INFO):
            fit(model, 1)
    finally:
        scvi.settings.verbosity = before
    assert any("GPU available" in record.getMessage() for record in caplog.records)


def test_a_bar_of_the_users_own_replaces_ours(model, capsys):
    fit(model, 1, enable_progress_bar=True, callbacks=[TQDMProgressBar()])
    assert "Reading data" not in capsys.readouterr().out


# -- training on --------------------------------------------------------------------------------------------------------


class Record(pl.Callback):
    """Weight of the divergences, and what the module is told, at each step."""

    def __init__(self):
        self.weight, self.progress = [], []

    def on_train_batch_start(self, trainer, plan, batch, batch_idx):
        self.weight.append(plan.kl_weight)
        self.progress.append(plan.annealing)


def test_later_training_goes_on_where_the_earlier_one_ended(model):
    first, second = Record(), Record()
    fit(model, 4, callbacks=[first], plan_kwargs={"n_epochs_kl_warmup": 2})
    assert first.weight[0] < 1e-5 and first.weight[-1] == 1.0
    assert first.progress[0] == 0.0 and first.progress == sorted(first.progress)
    fit(model, 2, callbacks=[second], plan_kwargs={"n_epochs_kl_warmup": 2})
    assert set(second.weight) == {1.0} and set(second.progress) == {1.0}


def test_training_goes_on_within_the_warm_up(model):
    first, second = Record(), Record()
    with pytest.warns(UserWarning, match="stopped"):
        fit(model, 4, callbacks=[first, At(press)], plan_kwargs={"n_epochs_kl_warmup": 4})
    assert first.weight[-1] == pytest.approx(0.25, abs=1e-5)
    fit(model, 3, callbacks=[second], plan_kwargs={"n_epochs_kl_warmup": 2})
    assert second.weight[0] == pytest.approx(first.weight[-1], abs=1e-5) and second.weight[-1] == 1.0
    assert first.progress[-1] <= second.progress[0] < 0.5 < second.progress[-1] < 1.0


def test_asked_warm_up_is_repeated(model):
    record = Record()
    fit(model, 1)
    fit(model, 2, callbacks=[record], plan_kwargs={"n_epochs_kl_warmup": 2, "min_kl_weight": 0.1})
    assert record.weight[0] == pytest.approx(0.1)


def test_history_of_several_trainings(model):
    fit(model, 2)
    first = model.history["elbo_train"].copy()
    fit(model, 4, train_size=0.8, check_val_every_n_epoch=2)
    history = model.history
    pd.testing.assert_frame_equal(history["elbo_train"].iloc[:2], first)
    assert history["elbo_train"].index.tolist() == [0, 1, 2, 3, 4, 5]
    assert history["elbo_validation"].index.tolist() == [3, 5], "scvi-tools alone forgets what came later"
    assert all(values.index.name == "epoch" for values in history.values())
