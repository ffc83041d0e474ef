"""Draw ``docs/_static/held_out_cell_type.png``: a cell type without treated cells in training, predicted and measured.

``python docs/figures/held_out_cell_type.py`` trains PertVAE once (minutes). One half of the cell type's control cells is what
models are asked about; the measured effect is against the other half, so that no noise of controls is on both axes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from scvi import settings

import pertura as pr

KEYS = {"perturbation_key": "condition", "control": "ctrl", "context_key": "cell_type"}
TOP = 100
MODELS = {"PertVAE": pr.model.PertVAE, "Linear baseline": pr.baseline.Linear, "Mean effect": pr.baseline.MeanEffect}


def panel(ax: plt.Axes, table: pd.DataFrame, name: str) -> None:
    """Predicted against measured effects of the genes that change most, with 90 % intervals."""
    own = table.loc[table["effect"].abs().nlargest(TOP).index]
    inside = own["effect"].sub(own["lfc_mean"]).abs() <= 1.645 * np.hypot(own["lfc_sd"], own["se"])
    reach = np.array([own["lfc_mean"] - own["ci_low"], own["ci_high"] - own["lfc_mean"]])
    ax.errorbar(own["effect"], own["lfc_mean"], yerr=reach, fmt="none", ecolor="0.8", elinewidth=0.8, zorder=1)
    ax.scatter(own["effect"], own["lfc_mean"], s=12, c=np.where(inside, "C0", "C3"), zorder=2)
    ax.axline((0, 0), slope=1, color="0.5", lw=0.8, zorder=0)
    r = np.corrcoef(own["effect"], own["lfc_mean"])[0, 1]
    error = np.sqrt(np.mean((own["effect"] - own["lfc_mean"]) ** 2))
    ax.set_title(f"{name}\nr = {r:.2f}, error {error:.2f}, {inside.mean():.0%} of intervals hold", fontsize="medium")
    ax.set_xlabel("measured effect")


def main() -> None:
    """Train, predict, draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--context", default="CD14+ Monocytes", help="cell type to hold out (default: %(default)s)")
    parser.add_argument("--max-epochs", type=int, help="training epochs (default: the model's own)")
    out = Path(__file__).parents[1] / "_static" / "held_out_cell_type.png"
    parser.add_argument("--out", default=out, help="default: %(default)s")
    options = parser.parse_args()
    settings.seed = 0
    adata = pr.datasets.kang_2018_mini()
    here, treated = adata.obs["cell_type"] == options.context, adata.obs["condition"] == "stim"
    control = np.random.default_rng(0).permutation(np.flatnonzero(here & ~treated))
    asked, reference = np.array_split(control, 2)
    # the reference half stays out of training too
    kept = ~(here & treated).to_numpy()
    kept[reference] = False
    train = adata[kept].copy()
    truth = adata[np.sort([*reference, *np.flatnonzero(here & treated)])].copy()
    measured = pr.metrics.measured_effect(truth, "stim", **KEYS)
    figure, axes = plt.subplots(1, 3, figsize=(9.6, 3.7), sharex=True, sharey=True, layout="constrained")
    for ax, (name, cls) in zip(axes, MODELS.items(), strict=True):
        cells = train.copy()
        cls.setup_anndata(cells, layer="counts", **KEYS)
        model = cls(cells)
        model.train(max_epochs=options.max_epochs if name == "PertVAE" else None)
        effect = model.get_perturbation_effect("stim", adata=adata[np.sort(asked)].copy())
        panel(ax, effect.merge(measured[["gene", "effect", "se"]], on="gene"), name)
    axes[0].set_ylabel("predicted effect, 90 % interval")
    figure.suptitle(
        f"Interferon-beta in {options.context}, whose treated cells were not in training: the {TOP} genes that change most",
        fontsize="medium",
    )
    figure.savefig(options.out, dpi=110)


if __name__ == "__main__":
    main()
