"""Training, saving and loading: what scvi-tools' Pyro path breaks must hold for every model."""

from __future__ import annotations

from functools import partial

import anndata
import lightning.pytorch as pl
import numpy as np
import pyro
import pytest
import torch
from scvi import settings

from pertura.model import PerturbationModel

# sums may be rounded one way or the other, depending on where in memory their terms are
equal = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)


def state(model: PerturbationModel) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.module.state_dict().items()}


def differing(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> list[str]:
    assert before.keys() == after.keys()
    return [k for k in before if before[k].shape != after[k].shape or not torch.equal(before[k], after[k])]


def predicted(model: PerturbationModel, **arguments) -> np.ndarray:
    name = model.vocabulary.names[0]
    return model.predict_perturbation(name, return_anndata=True, n_samples=4, **arguments).X


def test_models_side_by_side_do_not_touch_each_other(spec, screen):
    first, second = screen(), screen()
    spec.setup(first)
    one = spec.fit(spec.make(first))
    before, answer = state(one), predicted(one)
    spec.setup(second, context_key=None)
    other = spec.fit(spec.make(second), seed=1)
    predicted(other)
    assert not differing(before, state(one))
    equal(answer, predicted(one))
    spec.fit(one, seed=2)
    if spec.learns_by_gradient:
        assert differing(before, state(one)), "the older model can still be trained"
    assert len(pyro.get_param_store()) == 0


def test_two_models_of_one_anndata_with_other_registrations(spec, screen):
    adata = screen()
    spec.setup(adata)
    one = spec.fit(spec.make(adata))
    answer = predicted(one)
    spec.setup(adata, context_key=None, batch_key=None)
    other = spec.make(adata)
    assert other.contexts != one.contexts
    equal(answer, predicted(one))


def test_training_changes_every_parameter(gradient_spec, screen):
    adata = screen()
    gradient_spec.setup(adata)
    model = gradient_spec.make(adata)
    before = {k: v.detach().clone() for k, v in model.module.named_parameters()}
    gradient_spec.fit(model)
    still = [k for k, v in model.module.named_parameters() if torch.equal(before[k], v)]
    # without doses, the shape of the dose response plays no part
    assert [k for k in still if "dose" not in k and not k.endswith("log_kappa")] == []


def test_save_load_predicts_the_same_and_trains_on(spec, trained, screen, tmp_path):
    before, answer = state(trained), predicted(trained)
    trained.save(tmp_path / "model")
    saved = torch.load(tmp_path / "model" / "model.pt", weights_only=False)
    assert not saved["model_state_dict"]["pyro_param_store"]["params"]
    adata = screen()
    loaded = spec.cls.load(tmp_path / "model", adata=adata, accelerator="cpu")
    assert not differing(before, state(loaded))
    equal(answer, predicted(loaded))
    assert len(pyro.get_param_store()) == 0
    spec.fit(loaded)
    assert loaded.history["elbo_train"].shape[0] if spec.learns_by_gradient else True
    if spec.learns_by_gradient:
        assert differing(before, state(loaded)), "training after loading trains"
    assert not differing(before, state(trained)), "and leaves the saved model alone"


def test_loaded_without_data_predicts_for_data_passed(spec, trained, screen, tmp_path):
    trained.save(tmp_path / "model")
    loaded = spec.cls.load(tmp_path / "model", adata=False, accelerator="cpu")
    assert loaded.adata is None
    equal(predicted(trained), predicted(loaded, adata=screen()))
    with pytest.raises(ValueError, match="`adata`: the model was loaded without data"):
        predicted(loaded)
    with pytest.raises(ValueError, match="loaded without data"):
        loaded.train()
    loaded.save(tmp_path / "again")
    again = spec.cls.load(tmp_path / "again", adata=False, accelerator="cpu")
    equal(predicted(trained), predicted(again, adata=screen()))


def test_loaded_with_other_data_keeps_names_and_codes(spec, trained, screen, tmp_path):
    """Part of the cells, genes in another order and too many of them: the model stays what it was."""
    trained.save(tmp_path / "model")
    adata = screen()
    last = trained.vocabulary.names[-1]
    some = adata[adata.obs["perturbation"].isin(["control", last]).to_numpy()].copy()
    extra = some[:, :2].copy()
    extra.var_names = ["extra_1", "extra_2"]
    wide = anndata.concat([extra, some[:, some.var_names[::-1]].copy()], axis=1, merge="first")
    loaded = spec.cls.load(tmp_path / "model", adata=wide, accelerator="cpu")
    assert loaded.vocabulary == trained.vocabulary
    assert loaded.gene_names.equals(trained.gene_names)
    rows = adata.obs_names.get_indexer(wide.obs_names)
    expected = trained.predict_perturbation(last, adata=screen(), indices=rows, return_anndata=True, n_samples=4)
    found = loaded.predict_perturbation(last, return_anndata=True, n_samples=4)
    assert found.var_names.equals(expected.var_names)
    equal(found.X, expected.X)
    loaded.predict_perturbation(last, key_added="x", n_samples=4)
    equal(wide[:, trained.gene_names].layers["x"], expected.X)
    assert np.isnan(wide[:, ["extra_1", "extra_2"]].layers["x"]).all()
    spec.fit(loaded)
    loaded.save(tmp_path / "again")
    again = spec.cls.load(tmp_path / "again", adata=False, accelerator="cpu")
    assert again.gene_names.equals(trained.gene_names)


@pytest.mark.parametrize("column", ["cell_type", "batch"])
def test_loading_with_contexts_or_batches_unknown_to_the_model(spec, trained, screen, tmp_path, column):
    trained.save(tmp_path / "model")
    adata = screen()
    adata.obs[column] = ["new", *adata.obs[column].astype(str)[1:]]
    with pytest.raises(ValueError, match="'new' in .* was not in training"):
        spec.cls.load(tmp_path / "model", adata=adata, accelerator="cpu")


def test_view_anndata_setup(trained, capsys):
    trained.view_anndata_setup()
    shown = capsys.readouterr().out
    assert all(name in shown for name in (*trained.vocabulary.names, *trained.contexts))


def monitored(spec) -> str:
    return "prediction_validation" if spec.cls._predicts_in_training else "elbo_validation"


def test_history_and_early_stopping(gradient_spec, screen):
    adata = screen()
    gradient_spec.setup(adata)
    model = gradient_spec.make(adata)
    gradient_spec.fit(
        model, max_epochs=30, early_stopping=True, early_stopping_patience=1, early_stopping_min_delta=1e6
    )
    # no epoch improves by a million: the second validation stops it
    for name in ("elbo_validation", "elbo_train", monitored(gradient_spec)):
        assert len(model.history[name]) == 2
        assert np.isfinite(model.history[name].to_numpy(float)).all()
    assert len(model.validation_indices) == round(0.1 * adata.n_obs)
    assert not set(model.validation_indices) & set(model.train_indices)


def test_early_stopping_goes_back_to_the_best_prediction(gradient_spec, screen, monkeypatch):
    """The second of five epochs is made the best one; by what is not monitored it is the third."""
    adata = screen()
    gradient_spec.setup(adata)
    model, states = gradient_spec.make(adata), []

    def judge(plan) -> None:
        states.append(state(model))
        for name in ("elbo_validation", "prediction_validation"):
            plan.log(name, float(len(states) != (2 if name == monitored(gradient_spec) else 3)))

    monkeypatch.setattr(gradient_spec.cls._training_plan_cls, "validation_step", lambda *_: None)
    monkeypatch.setattr(gradient_spec.cls._training_plan_cls, "on_validation_epoch_end", judge)
    gradient_spec.fit(model, max_epochs=9, early_stopping=True, early_stopping_patience=3)
    assert len(states) == 5
    trained = {name for name, _ in model.module.named_parameters()}
    assert trained & set(differing(states[1], states[-1]))
    # what is set when training ends is no parameter
    assert not trained & set(differing(states[1], state(model)))


def test_validation_where_cells_are_held_out(gradient_spec, screen):
    adata = screen()
    gradient_spec.setup(adata)
    model = gradient_spec.fit(gradient_spec.make(adata), max_epochs=2, train_size=0.8)
    assert len(model.history["elbo_validation"]) == 2
    without = gradient_spec.fit(gradient_spec.make(adata), max_epochs=1)
    assert "elbo_validation" not in without.history
    assert len(without.train_indices) == adata.n_obs


def test_gradient_clipping(gradient_spec, screen):
    adata = screen()
    gradient_spec.setup(adata)
    model = gradient_spec.fit(gradient_spec.make(adata))
    moved = []
    for value in (1e-12, 1e6):
        before = {k: v.detach().clone() for k, v in model.module.named_parameters()}
        options = {"plan_kwargs": {"weight_decay": 0.0}, "gradient_clip_val": value}
        gradient_spec.fit(model, max_epochs=1, batch_size=adata.n_obs, **options)
        moved.append(max(float((v - before[k]).abs().max()) for k, v in model.module.named_parameters()))
    # Adam divides by the size of the gradient, but adds 1e-8 to it
    assert moved[0] < 1e-3 * moved[1]


def test_external_indexing(spec, screen):
    adata = screen()
    spec.setup(adata)
    order = np.random.default_rng(0).permutation(adata.n_obs)
    train, validation, test = np.split(order, [150, 180])
    model = spec.fit(spec.make(adata), datasplitter_kwargs={"external_indexing": [train, validation, test]})
    equal(model.train_indices, np.sort(train))
    equal(model.validation_indices, np.sort(validation))
    # what is outside the training rows plays no part
    changed = screen()
    counts = changed.layers["counts"].tolil()
    counts[test] = 7
    changed.layers["counts"] = counts.tocsr()
    spec.setup(changed)
    other = spec.fit(spec.make(changed), datasplitter_kwargs={"external_indexing": [train, validation, test]})
    assert not differing(state(model), state(other))


class Seed(pl.Callback):
    """What the draws of a training start from."""

    seen: int | None = None

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.seen = torch.initial_seed()


def test_seeds(gradient_spec, screen):
    adata = screen()
    gradient_spec.setup(adata)
    models, drawn = [], []
    for seed in (0, 0, 1):
        callback = Seed()
        models.append(gradient_spec.fit(gradient_spec.make(adata), max_epochs=1, seed=seed, callbacks=[callback]))
        drawn.append(callback.seen)
    one, same, other = models
    assert not differing(state(one), state(same))
    assert differing(state(one), state(other))
    # the order of the minibatches is not all that differs
    assert drawn[0] == drawn[1] != drawn[2]


def test_global_random_state_is_left_alone(spec, screen):
    adata = screen()
    spec.setup(adata)
    model = spec.make(adata)
    torch.manual_seed(5)
    np.random.seed(5)
    before, numbers = torch.get_rng_state(), np.random.get_state()[1].copy()
    spec.fit(model)
    assert torch.equal(before, torch.get_rng_state())
    equal(numbers, np.random.get_state()[1])


def test_as_autotune_calls_it(gradient_spec, screen):
    """The arguments of `scvi.autotune`; it reads the last validation from the trainer."""

    class Report(pl.Callback):
        values: list[float] = []

        def on_validation_end(self, trainer, module):
            self.values.append(float(trainer.callback_metrics["elbo_validation"]))

    adata = screen()
    gradient_spec.setup(adata)
    model = gradient_spec.make(adata)
    report = Report()
    callbacks = [report]
    model.train(
        accelerator="auto",
        devices="auto",
        check_val_every_n_epoch=1,
        enable_progress_bar=False,
        callbacks=callbacks,
        max_epochs=2,
        plan_kwargs={"lr": 1e-3},
    )
    assert len(report.values) == 2
    assert callbacks == [report], "the caller's list is not changed"


def test_loader_workers(gradient_spec, screen, monkeypatch):
    adata = screen()
    gradient_spec.setup(adata)
    alone = gradient_spec.fit(gradient_spec.make(adata), max_epochs=1)
    monkeypatch.setattr(settings, "dl_num_workers", 1)
    with_worker = gradient_spec.fit(gradient_spec.make(adata), max_epochs=1)
    assert not differing(state(alone), state(with_worker))


def test_loss_that_is_not_finite_stops(gradient_spec, screen):
    adata = screen()
    gradient_spec.setup(adata)
    model = gradient_spec.make(adata)
    with torch.no_grad():
        for parameter in model.module.parameters():
            parameter.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="nan.*smaller learning rate"):
        gradient_spec.fit(model)
    assert not model.is_trained_
    with pytest.raises(RuntimeError, match="not trained"):
        model.predict_perturbation(model.vocabulary.names[0])


def test_plan_is_told_of_max_epochs(gradient_spec, screen):
    """Schedules and warm-ups are fractions of the epochs, and end with them."""
    adata = screen()
    gradient_spec.setup(adata)
    model = gradient_spec.make(adata)
    told = []

    class Told(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
            share = module.n_steps_kl_warmup / trainer.estimated_stepping_batches
            told.append((trainer.max_epochs, module.annealing, module.kl_weight, share))

    options = {"n_epochs_kl_warmup": 0.5, "max_kl_weight": 0.8}
    gradient_spec.fit(model, max_epochs=4, plan_kwargs=options, callbacks=[Told()])
    assert {epochs for epochs, *_ in told} == {4} and len(told) == 4
    np.testing.assert_allclose([share for *_, share in told], 0.5, atol=0.1)
    np.testing.assert_allclose([share for _, share, *_ in told], [0.25, 0.5, 0.75, 1.0], atol=0.13)
    assert told[0][2] < 0.8 and told[-1][2] == pytest.approx(0.8)


def test_default_epochs_follow_the_size_of_the_data(gradient_spec, screen):
    adata = screen()
    gradient_spec.setup(adata)
    model = gradient_spec.make(adata)
    assert 10 <= model._default_max_epochs(4) <= 500
    # large data are seen often enough, very large ones no longer than 30,000 steps or the number that was asked for
    assert 10 <= model._default_max_epochs(500) <= 60
    assert model._default_max_epochs(10**4) == 3
    assert model._default_max_epochs(10**6) == 1
