"""Studies of networks: intervals of differences between them."""

from __future__ import annotations

import numpy as np
import pandas as pd
from anndata import AnnData

from pertura.benchmark import GivenNetwork


def test_intervals_are_over_genes():
    from network_intervals import study

    genes = [f"g{i}" for i in range(30)]
    truth = pd.DataFrame({"source": [f"g{i % 3}" for i in range(3, 30)], "target": genes[3:]})
    every = pd.MultiIndex.from_product([genes[:3], genes], names=["source", "target"]).to_frame(index=False)
    known = every.merge(truth.assign(weight=1.0), how="left").fillna(0.0)
    noise = every.assign(weight=np.random.default_rng(0).random(len(every)))
    models = {"noise": GivenNetwork(noise), "same": GivenNetwork(noise), "truth": GivenNetwork(known)}
    found = study(AnnData(np.zeros((1, 30))), {"net": truth}, models, n_resamples=50).set_index("model")
    assert found.loc["same", "difference_low"] == found.loc["same", "difference_high"] == 0
    low, high = found.loc["truth", ["difference_low", "difference_high"]]
    assert 0 < low < found.loc["truth", "auprc_ratio"] - found.loc["noise", "auprc_ratio"] < high
