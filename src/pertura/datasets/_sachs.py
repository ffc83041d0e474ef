"""Proteins of a signaling network under inhibitors and activators."""

from __future__ import annotations

import numpy as np
import pandas as pd
from anndata import AnnData

from ._beeline import _add_truth
from ._common import as_categories, as_names, describe, new_log
from ._fetch import fetch

__all__ = ["sachs_2005"]

_N_PROTEINS, _STIMULUS = 11, "cd3_cd28"
# what is named by the protein that it inhibits, and what acts on none that was measured or activates it
_NAMES = {
    "": "control",
    "aktinhib": "akt",
    "g0076": "pkc",
    "psitect": "pip2",
    "u0126": "mek",
    "ly": "LY294002",
    "icam2": "ICAM-2",
    "pma": "PMA",
    "b2camp": "b2cAMP",
}


def sachs_2005() -> AnnData:
    """Eleven phosphorylated proteins and lipids of human T cells under inhibitors and activators, with their network.

    7,466 cells x 11 proteins in nine conditions, by flow cytometry.

    Returns
    -------
    AnnData, cells x proteins. ``X``: log of fluorescence, float32, dense, at least 0; no counts exist.
    ``obs["perturbation"]``: the protein that an inhibitor acts on (``"akt"``, ``"pkc"``, ``"pip2"``, ``"mek"``), or the name of a reagent
    that inhibits none of the measured proteins (``"LY294002"``, of PI3K; ``"ICAM-2"``) or activates one (``"PMA"``, of PKC; ``"b2cAMP"``, of PKA);
    ``"control"``: anti-CD3 and anti-CD28 alone. ``obs["stimulus"]``: ``"CD3+CD28"``, or ``"none"`` with PMA and b2cAMP, which therefore
    have no controls. ``uns["ground_truth"]``: 20 edges of the consensus network, one row each: ``source``, ``target``, ``weight`` (1).
    ``varp["true_grn"]``: the same, CSR, ``[source, target]``.

    Raises
    ------
    DataNotAvailable
        Neither cache nor network has a file.

    Notes
    -----
    An inhibitor acts on the activity of a protein, of which the abundance of its phosphorylated form is measured: that of MEK rises under
    its inhibitor.

    References
    ----------
    Sachs et al. 2005, Science 308:523-529.
    """
    table = pd.read_csv(fetch("sachs_2005"), sep="\t")
    proteins = as_names(table.columns[:_N_PROTEINS])
    # what was given is 1 and else 0, with noise
    given = table.iloc[:, _N_PROTEINS:] > 0.5
    reagent = given.drop(columns=_STIMULUS)
    name = reagent.dot(reagent.columns).map(_NAMES)
    obs = pd.DataFrame(
        {
            "perturbation": as_categories(name, _NAMES.values()),
            "stimulus": as_categories(np.where(given[_STIMULUS], "CD3+CD28", "none")),
        },
        index=as_names([f"cell_{i}" for i in range(len(table))]),
    )
    adata = new_log(
        np.log(table.iloc[:, :_N_PROTEINS].to_numpy()),
        obs=obs,
        var=pd.DataFrame(index=proteins),
        dataset=describe(
            "sachs_2005", "sachs_2005", "sachs_2005_graph", perturbation_key="perturbation", control="control"
        ),
        scale="log",
    )
    edges = pd.read_csv(fetch("sachs_2005_graph"), header=None, names=["line"], sep="\t")["line"]
    edges = edges.str.extract(r"^\d+\. (?P<source>\w+) --> (?P<target>\w+)$").dropna().reset_index(drop=True)
    _add_truth(adata, edges.assign(weight=1.0))
    return adata
