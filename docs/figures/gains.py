"""Draw ``docs/_static/gains.png`` from ``gains.csv``, whose numbers are those of the tables of ``docs/trust.md``."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import pandas as pd

HERE = Path(__file__).parent


def main() -> None:
    """One line per task: models, baselines and the technical ceiling."""
    table = pd.read_csv(HERE / "gains.csv")
    tasks = list(dict.fromkeys(table["task"]))
    figure, ax = plt.subplots(figsize=(8.2, 4.4), layout="constrained")
    shown = {"baseline": ("0.55", "o"), "ceiling": ("0.25", "|"), "model": ("C0", "D")}
    for y, task in enumerate(tasks):
        own = table[table["task"] == task]
        ax.plot([own["r"].min(), own["r"].max()], [y, y], color="0.88", lw=1, zorder=0)
        for kind, (color, marker) in shown.items():
            part = own[own["kind"] == kind]
            ax.plot(part["r"], [y] * len(part), marker, color=color, ms=12 if kind == "ceiling" else 6, alpha=0.9)
        best = own[own["kind"] == "model"].nlargest(1, "r").iloc[0]
        simple = own[own["kind"] == "baseline"].nlargest(1, "r").iloc[0]
        ax.text(
            1.02,
            y,
            f"{best['predictor']} {best['r']:.2f}, {simple['predictor']} {simple['r']:.2f}",
            va="center",
            fontsize="small",
            transform=ax.get_yaxis_transform(),
        )
    for kind, (color, marker) in shown.items():
        name = {"baseline": "simple baselines", "ceiling": "technical ceiling", "model": "models"}[kind]
        ax.plot([], [], marker, color=color, label=name)
    ax.set(
        yticks=range(len(tasks)), yticklabels=tasks, xlim=(0, 1), xlabel="correlation of predicted and measured effect"
    )
    ax.invert_yaxis()
    ax.legend(frameon=False, fontsize="small", loc="lower right")
    ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(HERE.parent / "_static" / "gains.png", dpi=110)


if __name__ == "__main__":
    main()
