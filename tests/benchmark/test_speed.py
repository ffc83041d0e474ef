"""The bare loop computes what the model computes, and both are timed."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback

import pertura
from pertura.benchmark import Dataset, run_phases, run_speed
from pertura.benchmark._speed import BareLoop


@pytest.fixture
def dataset(screen):
    return Dataset(screen[:, :20].copy(), "simulated", "perturbation", "control", layer="counts")


def test_steps_of_models_are_timed(dataset):
    # two optimizers, and one
    table = run_speed(dataset, ["CPA", "InfoSEM"], n_steps=3, batch_size=32)
    assert table["model"].tolist() == ["CPA", "InfoSEM"]
    assert (table["ratio_low"] <= table["ratio"]).all() and (table["ratio"] <= table["ratio_high"]).all()
    assert (table[["data_ms", "gradient_ms", "bare_ms", "bare_gradient_ms", "cells_per_s"]] > 0).all(axis=None)
    assert (table["data_ms"] + table["gradient_ms"] < table["model_ms"]).all()


@pytest.mark.parametrize("name", ["PertVAE", "DrugAAE", "InfoSEM"])  # free nats, terms of the guide, closed forms
def test_the_bare_loss_is_that_of_the_model(dataset, name):
    """With the same draws both are the same number."""
    losses = []

    class Compare(Callback):
        def on_train_batch_start(self, trainer, plan, batch, batch_idx):
            args, options = plan.module._get_fn_args_from_batch(batch)
            options = {**options, "kl_weight": 0.5}
            elbo = BareLoop(plan, None).elbo
            for loss in (plan.differentiable_loss_fn, lambda _, __, *a, **o: elbo.loss(plan.module, a, o)):
                torch.manual_seed(0)
                losses.append(float(loss(plan.module.model, plan.module.guide, *args, **options).detach()))
            raise KeyError

    cls = getattr(pertura.model, name)
    cls.setup_anndata(dataset.adata, **dataset.keys)
    with pytest.raises(KeyError):
        cls(dataset.adata).train(max_epochs=1, callbacks=[Compare()], accelerator="cpu", enable_progress_bar=False)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_phases_of_a_model():
    every = run_phases(["SAMSVAE", "PertVAE"], n_cells=300, n_genes=30, n_perturbations=5, n_steps=4, n_names=50)
    assert every["step_s"].gt(0).all()
    assert every["decodes_per_mean"].isna().tolist() == [False, True]  # PertVAE decodes more than its latent state
    table = every.iloc[0]
    assert table["model"] == "SAMSVAE" and table["default_steps"] > 100
    for column in (
        "before_first_step_s",
        "step_s",
        "after_last_step_s",
        "mean_predictions_per_s",
        "bare_decodes_per_s",
    ):
        assert table[column] > 0
    assert table["tail"] == pytest.approx(table["after_last_step_s"] / (table["step_s"] * table["default_steps"]))
    assert 0 < table["names_s"] < 2
