"""Tiny data with exact means, and baselines fitted to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData

SETUP = {"perturbation_key": "perturbation", "control": "ctrl", "context_key": "context"}
# around the mean of each condition; its standard deviation is 1
SPREAD = np.sqrt(3 / 10) * np.array([-1.0, 1.0, -2.0, 2.0])


@pytest.fixture
def made() -> Callable[..., AnnData]:
    """`made({(label, context): mean})` has four profiles per condition, around exactly its mean."""

    def make(means: dict[tuple, Any], *, sd: float = 0.1) -> AnnData:
        x = np.concatenate([np.asarray(mean, float) + sd * SPREAD[:, None] for mean in means.values()])
        columns = ["perturbation", "context", "dose"][: len(next(iter(means)))]
        obs = pd.DataFrame([key for key in means for _ in SPREAD], columns=columns)
        obs.index = [f"profile{i}" for i in range(len(x))]
        return AnnData(x, obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(x.shape[1])]))

    return make


@pytest.fixture
def fit(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`fit(cls, adata, **options)` sets up, makes and trains; without calibration, which takes most of the time."""

    def fitted(
        cls: type,
        adata: AnnData,
        *,
        setup: dict[str, Any] | None = None,
        train: dict[str, Any] | None = None,
        calibrated: bool = False,
        **options: Any,
    ) -> Any:
        cls.setup_anndata(adata, **{**SETUP, **(setup or {})})
        model = cls(adata, **options)
        with monkeypatch.context() as patch:
            if not calibrated:
                patch.setattr(cls, "_after_training", lambda self, rows, table: None)
            model.train(**(train or {}))
        return model

    return fitted


@pytest.fixture
def effect() -> Callable[..., np.ndarray]:
    """`effect(model, label, context)` on the mean of the controls of a context."""

    def of(model: Any, label: str, context: str, column: str = "lfc_mean", **options: Any) -> np.ndarray:
        table = model.get_perturbation_effect(label, **options)
        return table.loc[table["context"] == context, column].to_numpy()

    return of
