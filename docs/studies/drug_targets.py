"""Targets of drugs that DrugAAE finds, beside how popular a gene is as a target and its degree in the protein network.

Areas under the ROC curve over genes, of the targets that the Drug Repurposing Hub knows. Names of drugs and words of targets are taken
out of the texts that describe the drugs. All profiles train.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from _common import CONTROL, Screen, ht115, parser, show, start, tggates
from sklearn.metrics import roc_auc_score

from pertura import benchmark, model, priors
from pertura.metrics import bootstrap_interval

SCREENS = {"HT115": ht115, "TG-GATEs": tggates}
POPULARITY = "popularity"


def known_targets(screen: Screen) -> pd.DataFrame:
    """Compounds x genes, of the compounds of which a target among the genes is known."""
    from pertura.datasets import repurposing_hub

    hub, genes = repurposing_hub(), screen.adata.var_names
    row = priors.match_drugs(screen.compounds, hub).dropna()
    found = {n: genes.isin(str(hub.loc[[r], "target"].iloc[0]).split("|")) for n, r in row.items()}
    table = pd.DataFrame(found, index=genes).T
    return table[table.any(axis=1)]


def areas(
    screen: Screen, known: pd.DataFrame, features: pd.DataFrame, *, seed: int, max_epochs: int = 15
) -> pd.DataFrame:
    """Area under the ROC curve of each drug, drugs x methods; the screen has a protein network in ``varp["ppi"]``."""
    adata = screen.adata.copy()
    adata.uns["features"] = features
    keys = {"perturbation_key": "perturbation", "control": CONTROL, **screen.setup}
    keys |= {"ppi_key": "ppi", "perturbation_features_key": "features"}
    train = {"max_epochs": max_epochs, "accelerator": "cpu"}
    fitted = benchmark.ModelSpec(model.DrugAAE, train=train)(adata, setup=keys, seed=seed)
    drugs = list(known.index)
    scores = {
        "network": fitted.get_drug_target_scores(drugs),
        "signature": fitted.get_drug_target_scores(drugs, method="signature"),
        "neighbors": fitted.get_drug_target_scores(drugs, method="neighbors", known_targets=known),
        "degree": known * 0.0 + np.asarray(adata.varp["ppi"].sum(1)).ravel(),
        POPULARITY: known.sum() - known.astype(float),  # the drug's own targets do not count
    }
    area = {k: [roc_auc_score(known.loc[n], s.loc[n, known.columns]) for n in drugs] for k, s in scores.items()}
    return pd.DataFrame(area, index=drugs)


def study(screens: dict[str, Screen], *, seeds: int, results: benchmark.Results, max_epochs: int = 15) -> pd.DataFrame:
    """One row per screen, drug and method."""
    for name, screen in screens.items():
        known = known_targets(screen)
        priors.ppi_network(screen.adata)
        text = priors.describe_drugs(screen.compounds, mask_targets=True, include_name=False)
        features = priors.drug_table(screen.compounds, text=text)
        for seed in range(seeds):
            run = {"dataset": name, "split": "drug_targets", "seed": seed}
            if not results.has(run, settings=f"{max_epochs} epochs"):
                found = areas(screen, known, features, seed=seed, max_epochs=max_epochs)
                rows = found.rename_axis("perturbation").reset_index().melt("perturbation", var_name="model")
                results.add(rows.assign(metric="auroc"), run, settings=f"{max_epochs} epochs")
    return results.select(dataset=list(screens), seed=range(seeds))


def summary(found: pd.DataFrame) -> pd.DataFrame:
    """Means over drugs, and paired gains over popularity, with 95 % intervals over drugs."""
    rows = []
    for dataset, frame in found.groupby("dataset", sort=False):
        wide = frame.pivot_table(index="perturbation", columns="model", values="value", sort=False)
        for method in wide:
            gain = bootstrap_interval(wide[method], wide[POPULARITY], level=0.95)
            value = bootstrap_interval(wide[method], level=0.95)
            row = dict(zip(("auroc", "low", "high"), value, strict=True))
            row |= dict(zip(("over_popularity", "gain_low", "gain_high"), gain, strict=True))
            rows.append({"screen": dataset, "method": method, **row, "n_drugs": len(wide)})
    return pd.DataFrame(rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the study."""
    options = start(parser(__doc__, seeds=1), argv)
    screens = {name: load() for name, load in SCREENS.items()}
    show(summary(study(screens, seeds=options.seeds, results=benchmark.Results(options.out))))


if __name__ == "__main__":
    main()
