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
from anndata import AnnData
from lightning.pytorch.callbacks import TQDMProgressBar

from pertura import datasets
from pertura.model import CPA, CRADLEVAE, GPOVAE, SAMSVAE, PertVAE
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


def make(cls, screen, **options):
    adata = screen.copy()
    keys = {"perturbation_key": "perturbation", "control": "control", "layer": "counts", "context_key": "cell_type"}
    cls.setup_anndata(adata, **keys)
    return cls(adata, n_latent=3, **options)


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


# -- validation ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def bulk():
    """Two perturbations in two contexts, Gaussian; the effects are known."""
    rng = np.random.default_rng(0)
    rows = [(p, c) for p in ("control", "a", "b") for c in ("x", "y") for _ in range(8)]
    obs = pd.DataFrame(rows, columns=["perturbation", "cell_type"], index=[f"cell {i}" for i in range(len(rows))])
    adata = AnnData(rng.normal(size=(len(obs), 5)).astype(np.float32), obs=obs)
    PertVAE.setup_anndata(adata, perturbation_key="perturbation", control="control", context_key="cell_type")
    return PertVAE(adata, n_latent=3)


def rows_of(model, label, context):
    obs = model.adata.obs
    return np.flatnonzero((obs["perturbation"] == label) & (obs["cell_type"] == context))


def held_out(model, validation):
    train = np.setdiff1d(np.arange(model.adata.n_obs), validation)
    return model._data_module(train, np.sort(validation), 64, 0)


def test_error_of_predictions(bulk, monkeypatch):
    """Held-out cells of each condition against held-out controls, by precision; training controls where none are held out."""
    parts = {
        ("a", "x"): (rows_of(bulk, "a", "x")[:4], rows_of(bulk, "control", "x")[:4]),
        ("b", "x"): (rows_of(bulk, "b", "x")[:1], rows_of(bulk, "control", "x")[:4]),
        ("b", "y"): (rows_of(bulk, "b", "y")[:2], rows_of(bulk, "control", "y")),
    }
    validation = np.concatenate([*(treated for treated, _ in parts.values()), rows_of(bulk, "control", "x")[:4]])
    asked = []

    def predict(controls, perturbations, n_samples):
        asked.append((set(controls.rows), [p.label for p in perturbations]))
        return np.full((len(perturbations), 5), 0.5)

    monkeypatch.setattr(bulk, "_effects_on", predict)
    error = bulk._prediction_error(held_out(bulk, validation))
    assert len(error) == 3
    total = weight = 0.0
    for treated, controls in parts.values():
        own = 1 / (1 / len(treated) + 1 / len(controls))
        effect = bulk.adata.X[treated].mean(0) - bulk.adata.X[controls].mean(0)
        total, weight = total + own * np.mean((0.5 - effect) ** 2), weight + own
    assert error() == pytest.approx(total / weight, rel=1e-5)
    assert asked == [
        (set(parts["a", "x"][1]), ["a", "b"]),
        (set(parts["b", "y"][1]), ["b"]),
    ]


def test_error_of_predictions_leaves_random_states_alone(bulk):
    error = bulk._prediction_error(held_out(bulk, np.arange(0, bulk.adata.n_obs, 2)))
    before = torch.get_rng_state()
    assert error() == error()
    assert torch.equal(before, torch.get_rng_state())


def test_error_of_predictions_falls_while_effects_are_learned(screen):
    model = make(PertVAE, screen)
    effect = model.module.effect_b
    fit(model, 60, train_size=0.7, batch_size=60)
    found = model.history["prediction_validation"]["prediction_validation"].to_numpy(float)
    assert len(found) == 60 and float(effect.detach().abs().max()) > 0.1
    assert found[-5:].mean() < 0.95 * found[0]


def test_early_stopping_without_treated_validation_cells(bulk):
    validation = rows_of(bulk, "control", "x")[:3]
    train = np.setdiff1d(np.arange(bulk.adata.n_obs), validation)
    split = {"external_indexing": [train, validation]}
    fit(
        bulk, 5, early_stopping=True, early_stopping_patience=1, early_stopping_min_delta=1e6, datasplitter_kwargs=split
    )
    assert "prediction_validation" not in bulk.history and len(bulk.history["elbo_validation"]) == 2


def test_other_things_can_be_monitored(bulk):
    options = {"early_stopping_monitor": "elbo_validation", "early_stopping_min_delta": 1e6}
    fit(bulk, 5, early_stopping=True, early_stopping_patience=2, **options)
    assert len(bulk.history["elbo_validation"]) == len(bulk.history["prediction_validation"]) == 3


def test_default_length_of_training():
    """Enough steps on small data, enough epochs on large ones, and an end on the largest."""
    assert training.default_epochs(5, n_steps=1000, n_epochs=60) == 200
    assert training.default_epochs(100, n_steps=1000, n_epochs=60) == 60
    assert training.default_epochs(10_000, n_steps=1000, n_epochs=60) == 3
    assert training.default_epochs(10_000, n_steps=100_000, n_epochs=60) == 10


@pytest.mark.parametrize("cls", [SAMSVAE, CPA, PertVAE, CRADLEVAE, GPOVAE])
def test_presets_take_the_steps_of_their_papers(screen, cls):
    model = make(cls, screen, preset="paper")
    assert model.options.n_steps >= 10_000
    for n_batches in (2, 40):
        assert abs(model._default_max_epochs(n_batches) * n_batches - model.options.n_steps) <= n_batches
    assert model._default_max_epochs(2000) * 2000 >= model.options.n_steps
