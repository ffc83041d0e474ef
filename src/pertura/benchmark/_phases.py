"""What a user waits for: before the first step of training, after the last one, and for predictions."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy import sparse

from ._runner import quiet

_N_CELLS, _N_NAMES, _CHUNK = 1000, 20, 2000


def screen(n_cells: int, n_genes: int, n_perturbations: int, seed: int = 0) -> AnnData:
    """Sparse counts of a screen with effects on 40 genes each; about 15 % of the entries are not zero."""
    rng = np.random.default_rng(seed)
    mean, depth = np.exp(rng.normal(-2.2, 1.2, n_genes)), np.exp(rng.normal(0.0, 0.3, n_cells))
    label = rng.integers(0, n_perturbations + 1, n_cells)
    label[rng.random(n_cells) < 0.1] = 0
    effect = np.zeros((n_perturbations + 1, n_genes))
    for own in effect[1:]:
        own[rng.choice(n_genes, min(40, n_genes), replace=False)] = rng.normal(size=min(40, n_genes))
    parts = []
    for start in range(0, n_cells, _CHUNK):
        rows = slice(start, start + _CHUNK)
        rate = mean * depth[rows, None] * np.exp(effect[label[rows]])
        parts.append(sparse.csr_matrix(rng.poisson(rng.gamma(2.0, rate / 2.0)).astype(np.float32)))
    names = np.where(label == 0, "control", np.char.add("P", label.astype(str)))
    obs = pd.DataFrame({"perturbation": pd.Categorical(names)}, index=np.arange(n_cells).astype(str))
    return AnnData(
        sparse.vstack(parts, format="csr"), obs=obs, var=pd.DataFrame(index=[f"G{i}" for i in range(n_genes)])
    )


def run_phases(
    models: Sequence[str] = ("SAMSVAE",),
    *,
    n_cells: int = 20_000,
    n_genes: int = 2000,
    n_perturbations: int = 200,
    n_steps: int = 40,
    n_names: int = 2000,
) -> pd.DataFrame:
    """Time the phases of models on a simulated screen, in seconds of the processor on one thread.

    Parameters
    ----------
    models
        Names in :mod:`pertura.model`, with a decoder that reads a latent state.
    n_cells, n_genes, n_perturbations
        Size of the screen.
    n_steps
        Steps of training that are timed.
    n_names
        Perturbations whose names are looked up.

    Returns
    -------
    One row per model: ``before_first_step_s``, ``step_s``, ``default_steps``, ``after_last_step_s``, ``tail`` (that in units
    of the default training), ``names_s`` (bookkeeping of `n_names` perturbations), ``bare_decodes_per_s`` (cells whose
    expected counts the decoder gives, per second), ``mean_predictions_per_s`` (cells x perturbations x draws per second) and
    ``decodes_per_mean`` (what one mean prediction of a cell costs, in bare decodes).
    """
    import pertura

    before, adata = torch.get_num_threads(), screen(n_cells, n_genes, n_perturbations)
    torch.set_num_threads(1)
    try:
        return pd.DataFrame([_phases(getattr(pertura.model, name), adata, n_steps, n_names) for name in models])
    finally:
        torch.set_num_threads(before)


def _phases(cls: Any, adata: AnnData, n_steps: int, n_names: int) -> dict[str, Any]:
    from lightning.pytorch.callbacks import Callback

    from pertura.model.base._model import FEW_SAMPLES

    class Clock(Callback):
        """When the first and the last step were done."""

        def on_train_start(self, *args: Any) -> None:
            self.start = time.process_time()

        def on_train_end(self, *args: Any) -> None:
            self.stop = time.process_time()

    clock, result = Clock(), {"model": cls.__name__}
    cls.setup_anndata(adata, perturbation_key="perturbation", control="control")
    model = cls(adata)
    batch_size = model._default_batch_size(adata.n_obs)
    n_batches = max(1, round(adata.n_obs / batch_size))
    n_epochs = max(1, round(n_steps / n_batches))
    started = time.process_time()
    with quiet():
        model.train(max_epochs=n_epochs, accelerator="cpu", enable_progress_bar=False, callbacks=[clock])
    result["before_first_step_s"] = clock.start - started
    result["step_s"] = (clock.stop - clock.start) / (n_epochs * n_batches)
    result["default_steps"] = model._default_max_epochs(n_batches) * n_batches
    result["after_last_step_s"] = time.process_time() - clock.stop
    result["tail"] = result["after_last_step_s"] / (result["step_s"] * result["default_steps"])
    result["names_s"] = _names(model, n_names)

    control = np.flatnonzero((adata.obs["perturbation"] == "control").to_numpy())[:_N_CELLS]
    names = list(model.vocabulary.names)[:_N_NAMES]
    asked = {"indices": control, "by": "context", "ci": None}
    model.predict_perturbation(names[:1], **asked)  # what is compiled once
    seconds = _clocked(lambda: model.predict_perturbation(names, **asked))
    each = seconds / (len(control) * len(names))
    z = torch.randn(len(control), model.module.n_latent)
    library = torch.full((len(control), 1), 2000.0)

    def decode() -> None:
        with torch.no_grad():
            for _ in range(20):
                model.module.likelihood.rate(model.module.decoder(z, None), library)

    try:
        decode()
    except (AttributeError, RuntimeError, TypeError):
        return result  # a model that decodes more than its latent state has no such bare decode
    bare = _clocked(decode) / (20 * len(control))
    result["bare_decodes_per_s"] = 1.0 / bare
    result["mean_predictions_per_s"] = FEW_SAMPLES / each
    result["decodes_per_mean"] = each / bare
    return result


def _names(model: Any, n_names: int) -> float:
    """Seconds of bookkeeping for many perturbations: names, doses, distance from the data."""
    from pertura.model.base._arguments import resolve_perturbations

    known = list(model.vocabulary.names)
    names = [f"{a}+{b}" for i, a in enumerate(known) for b in known[i + 1 :]][: max(0, n_names - len(known))] + known
    model._fitted_discrepancy = None

    def look_up() -> None:
        found = resolve_perturbations(model, names[:n_names], None)
        for perturbation in found:
            model._discrepancy.novelty(perturbation, model.contexts[0])
            for context in model.contexts:
                model._discrepancy.spread(perturbation, context)

    return _clocked(look_up)


def _clocked(call: Any) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start
