from __future__ import annotations

import numpy as np
import pytest
import torch

from pertura import benchmark as bm
from pertura.benchmark._spec import digest
from pertura.model import PertVAE


def test_parse_model():
    name, spec = bm.parse_model("PertVAE:preset=paper,n_latent=10,train.max_epochs=20,predict.n_samples=5")
    assert name.startswith("PertVAE:")
    assert spec.cls is PertVAE and spec.stochastic
    assert spec.init == {"preset": "paper", "n_latent": 10}
    assert spec.train == {"max_epochs": 20} and spec.predict == {"n_samples": 5}
    assert bm.parse_model("PertVAE")[1].init == {}
    assert not bm.parse_model("MeanEffect")[1].stochastic


@pytest.mark.parametrize("text", ["Unheard", "DEFAULT", "PertVAE:n_latent", "PertVAE:other.x=1", ""])
def test_parse_model_refuses(text):
    with pytest.raises(ValueError, match="`models`"):
        bm.parse_model(text)


def test_a_spec_hands_over_its_arguments_and_leaves_the_random_state():
    calls = []

    class Model:
        @classmethod
        def setup_anndata(cls, adata, **arguments):
            calls.append(arguments)

        def __init__(self, adata, **arguments):
            calls.append(arguments)
            self.weight = torch.rand(())

        def train(self, **arguments):
            calls.append(arguments)

    spec = bm.ModelSpec(Model, setup={"batch_key": "b"}, init={"n": 1}, train={"max_epochs": 2})
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    first = torch.rand(1)
    made = [spec(None, setup={"control": "c", "batch_key": None}, seed=seed).weight for seed in (1, 2, 1)]
    assert torch.equal(torch.cat([first, torch.rand(1)]), expected)
    assert made[0] == made[2] != made[1]
    assert calls[0] == {"control": "c", "batch_key": "b"} and calls[1] == {"n": 1}
    assert calls[2]["max_epochs"] == 2 and calls[2]["seed"] == 1


def test_digest_follows_the_settings():
    base = bm.ModelSpec(PertVAE, init={"n_latent": 10})
    assert digest(base, 1) == digest(bm.ModelSpec(PertVAE, init={"n_latent": 10}), 1)
    assert len({digest(base, 1), digest(base, 2), digest(bm.ModelSpec(PertVAE), 1), digest(np.mean, 1)}) == 4
