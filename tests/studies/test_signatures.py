"""The study of signatures."""

from __future__ import annotations

import numpy as np
import pandas as pd
from anndata import AnnData


def test_a_context_of_which_some_is_known(tmp_path, capsys):
    """Compounds that do something else in one cell type, in proportion to what they do elsewhere."""
    from signatures import RIDGE, gains, study

    rng = np.random.default_rng(0)
    score, axes = rng.normal(size=(30, 3)), rng.normal(size=(3, 3, 40))
    x = np.concatenate([score @ a + 0.3 * rng.normal(size=(30, 40)) for a in axes[[0, 0, 1]]])
    labels = [(f"(+)-d{i}", c) for c in "xyz" for i in range(30)]
    obs = pd.DataFrame(labels, columns=["perturbation", "cell_type"], index=[f"row{i}" for i in range(90)])
    adata, file = AnnData(x.astype(np.float32), obs=obs), str(tmp_path / "found.csv")
    asked = {"shares": [0.5], "seeds": 1, "contexts": ["z"], "models": ["mean effect", "PerturbX", RIDGE]}
    table = study(adata, **asked, out=file)
    found = table.groupby("model")["pearson_effect"].mean()
    assert found["PerturbX"] > 0.8 and found[RIDGE] > 0.8 > 0.4 > found["mean effect"]
    assert len(study(adata, **asked, out=file)) == len(table) == 3 * 15  # read, not repeated
    gain = gains(table.assign(share="50%")).set_index("over")["gain"]
    expected = found["PerturbX"] - found["mean effect"]
    assert gain["mean effect"].startswith(f"{expected:+.3f} (")
