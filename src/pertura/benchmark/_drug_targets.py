"""Targets of drugs that DrugAAE finds, beside how popular a gene is as a target and its degree in the protein network."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from ._compounds import fit_drugaae
from ._screens import CONTROL, Screen, ht115_screen, tggates_screen

logger = logging.getLogger(__name__)

_SCREENS: dict[str, Callable[[], Screen]] = {"HT115": ht115_screen, "TG-GATEs": tggates_screen}
_POPULARITY = "popularity"


def drug_targets(*, seeds: int | Sequence[int] = 1, max_epochs: int = 15) -> pd.DataFrame:
    """Area under the ROC curve over genes of the targets that the Drug Repurposing Hub knows.

    Names of drugs and words of targets are taken out of the texts that describe the drugs. All profiles train.

    Parameters
    ----------
    seeds
        Of training; areas are averaged.
    max_epochs
        Epochs of training.

    Returns
    -------
    One row per screen and method: ``auroc``, mean over drugs with a target among the genes, ``over_popularity``, the paired
    difference from how many of the other drugs hit a gene, 95 % intervals over drugs beside, and ``n_drugs``.
    """
    from pertura.priors import describe_drugs, drug_table, ppi_network

    tables = []
    for data, load in _SCREENS.items():
        screen = load()
        known = known_targets(screen)
        ppi_network(screen.adata)
        screen.setup["ppi_key"] = "ppi"
        names = _compounds(screen)
        features = drug_table(names, text=describe_drugs(names, mask_targets=True, include_name=False))
        numbers = range(seeds) if isinstance(seeds, int) else seeds
        runs = [target_areas(screen, known, features, seed, max_epochs) for seed in numbers]
        area = sum(runs) / len(runs)
        gain = area.sub(area[_POPULARITY], axis=0)
        columns = {
            "auroc": area.mean(),
            "auroc_ci": 1.96 * area.sem(),
            "over_popularity": gain.mean(),
            "over_popularity_ci": 1.96 * gain.sem(),
        }
        table = pd.DataFrame(columns).rename_axis("method").reset_index().assign(n_drugs=len(area))
        table.insert(0, "screen", data)
        tables.append(table)
        logger.info("%s, %d drugs", data, len(area))
    return pd.concat(tables, ignore_index=True)


def known_targets(screen: Screen) -> pd.DataFrame:
    """Compounds x genes, of the compounds of which the Drug Repurposing Hub knows a target among the genes."""
    from pertura.datasets import repurposing_hub
    from pertura.priors import match_drugs

    hub = repurposing_hub()
    genes = screen.adata.var_names
    row = match_drugs(_compounds(screen), hub).dropna()
    found = {n: genes.isin(str(hub.loc[[r], "target"].iloc[0]).split("|")) for n, r in row.items()}
    table = pd.DataFrame(found, index=genes).T
    return table[table.any(axis=1)]


def _compounds(screen: Screen) -> list[str]:
    return [n for n in screen.adata.obs["perturbation"].astype(str).unique() if n != CONTROL]


def target_areas(
    screen: Screen, known: pd.DataFrame, features: pd.DataFrame, seed: int, max_epochs: int
) -> pd.DataFrame:
    """Area under the ROC curve of each drug, drugs x methods; the screen has a network in ``varp["ppi"]``."""
    from sklearn.metrics import roc_auc_score

    use = np.ones(screen.adata.n_obs, dtype=bool)
    model: Any = fit_drugaae(screen, use, features, seed=seed, model={}, train={"max_epochs": max_epochs})
    drugs = list(known.index)
    degree = np.asarray(screen.adata.varp["ppi"].sum(1)).ravel()
    scores = {
        "network": model.get_drug_target_scores(drugs),
        "signature": model.get_drug_target_scores(drugs, method="signature"),
        "neighbors": model.get_drug_target_scores(drugs, method="neighbors", known_targets=known),
        "degree": known * 0.0 + degree,
        _POPULARITY: known.sum() - known.astype(float),  # the drug's own targets do not count
    }
    area = {k: [roc_auc_score(known.loc[n], s.loc[n, known.columns]) for n in drugs] for k, s in scores.items()}
    return pd.DataFrame(area, index=drugs)
