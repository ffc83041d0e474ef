"""The bare loop computes what the model computes, and both are timed."""

import numpy as np
import pyro
import pytest
import torch

from pertura.benchmark import Dataset, run_phases, run_speed
from pertura.benchmark._speed import BareLoop
from pertura.model import SAMSVAE
from pertura.module import Cells


@pytest.fixture
def dataset(screen):
    return Dataset(screen[:, :20].copy(), "simulated", "perturbation", "control", layer="counts")


def test_steps_are_counted(dataset):
    single = dataset.adata[~dataset.adata.obs["perturbation"].str.contains("+", regex=False)].copy()
    data = Dataset(single, "simulated", "perturbation", "control", layer="counts")
    table = run_speed(data, n_steps=12, batch_size=32, n_latent=3).iloc[0]
    assert 0 < table["ratio_low"] <= table["ratio"] <= table["ratio_high"]
    assert table["model_cells_per_s"] > 0 and table["bare_ms"] > 0


def test_the_bare_loss_is_that_of_the_model(dataset):
    """With the posteriors all but points, both are the same number."""
    adata = dataset.adata[~dataset.adata.obs["perturbation"].str.contains("+", regex=False)].copy()
    SAMSVAE.setup_anndata(adata, perturbation_key="perturbation", control="control", layer="counts")
    model = SAMSVAE(adata, n_latent=3, effects="latent")
    module, rows = model.module, np.arange(adata.n_obs)
    tensors = next(iter(model._data_module(rows, rows[:0], adata.n_obs, 0).train_dataloader()))
    module.n_train = adata.n_obs
    with torch.no_grad():
        module.shifts.log_sd.fill_(-20.0)
        module.shifts.mask_logits.fill_(30.0)
        module.encoder.log_variance.weight.zero_()
        module.encoder.log_variance.bias.fill_(-20.0)
        module.shifts.loc.normal_()
    bare = BareLoop(module, tensors, adata.n_obs)
    cells = Cells.from_tensors(tensors)
    elbo = pyro.infer.Trace_ELBO(num_particles=20, vectorize_particles=False, max_plate_nesting=1)
    with torch.no_grad():
        own = elbo.loss(module.model, module.guide, cells) / adata.n_obs
        other = np.mean([float(bare.loss(torch.arange(adata.n_obs))) for _ in range(20)])
    np.testing.assert_allclose(own, other, rtol=2e-3)


def test_phases_of_a_model():
    table = run_phases(["SAMSVAE"], n_cells=300, n_genes=30, n_perturbations=5, n_steps=4, n_names=50).iloc[0]
    assert table["model"] == "SAMSVAE" and table["default_steps"] > 100
    for column in (
        "before_first_step_s",
        "step_s",
        "after_last_step_s",
        "mean_predictions_per_s",
        "bare_decodes_per_s",
    ):
        assert table[column] > 0
    assert np.isclose(table["tail"], table["after_last_step_s"] / (table["step_s"] * table["default_steps"]))
    assert 0 < table["names_s"] < 2
