"""MuData whose second modality says what was done: cells x perturbations (gRNAs, drugs with doses)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from mudata import MuData
from scipy import sparse

LABEL, DOSE = "_pertura_perturbation", "_pertura_dose"


def check_modality(mdata: Any, argument: str, key: str) -> AnnData:
    """The named modality."""
    if not isinstance(mdata, MuData):
        raise ValueError(
            f"`mdata` must be a MuData, got {type(mdata).__name__}. Use `setup_anndata` for an AnnData."
        )
    if key not in mdata.mod:
        raise ValueError(
            f"`{argument}`: {key!r} is not a modality of `mdata`, which has {', '.join(mdata.mod)}."
        )
    return mdata.mod[key]


def perturbations_of_matrix(mdata: MuData, settings: dict[str, Any]) -> pd.DataFrame:
    """Label (and doses) of each cell of the expression modality.

    Parameters
    ----------
    mdata
        Expression and perturbations.
    settings
        ``rna_mod``, ``perturbation_mod``, ``perturbation_layer``, ``target_key``, ``threshold``, ``values``
        (``"presence"`` or ``"dose"``), ``control``, ``delimiter``; see ``setup_mudata``.

    Returns
    -------
    Columns ``label`` and ``dose`` (text, joined like the label; absent with ``values="presence"``).
    """
    cells = check_modality(mdata, "rna_mod", settings["rna_mod"]).obs_names
    applied = check_modality(mdata, "perturbation_mod", settings["perturbation_mod"])
    missing = cells.difference(applied.obs_names)
    if len(missing):
        raise ValueError(
            f"`perturbation_mod`: {len(missing)} of {len(cells)} cells of {settings['rna_mod']!r} are not in "
            f"{settings['perturbation_mod']!r}. Subset `mdata` to the cells that both modalities have."
        )
    layer = settings["perturbation_layer"]
    if layer is not None and layer not in applied.layers:
        raise ValueError(
            f"`perturbation_layer`: {layer!r} is not a layer of {settings['perturbation_mod']!r}."
        )
    names = applied.var_names.to_numpy(dtype=object)
    if settings["target_key"] is not None:
        if settings["target_key"] not in applied.var:
            raise ValueError(
                f"`target_key`: {settings['target_key']!r} is not a column of `mdata[{settings['perturbation_mod']!r}].var` "
                f"({', '.join(applied.var.columns)})."
            )
        names = applied.var[settings["target_key"]].astype(str).to_numpy(dtype=object)
    values = applied[cells].X if layer is None else applied[cells].layers[layer]
    values = sparse.coo_matrix(values)
    table = pd.DataFrame({"cell": values.row, "name": names[values.col], "dose": values.data})
    table = table[(table["dose"] > settings["threshold"]) & (table["name"] != settings["control"])]
    # several gRNAs of one target are one perturbation
    table = table.groupby(["cell", "name"], as_index=False, sort=True)["dose"].max()
    joined = table.assign(dose=table["dose"].map("{:g}".format)).groupby("cell")[["name", "dose"]]
    joined = joined.agg(settings["delimiter"].join).reindex(np.arange(len(cells)))
    out = pd.DataFrame({"label": joined["name"].fillna(settings["control"]).to_numpy()}, index=cells)
    if settings["values"] == "dose":
        out["dose"] = joined["dose"].fillna("0").to_numpy()
    return out


def annotate(mdata: MuData, settings: dict[str, Any]) -> AnnData:
    """Expression modality with the labels in ``obs["_pertura_perturbation"]`` (and ``["_pertura_dose"]``)."""
    table = perturbations_of_matrix(mdata, settings)
    rna = mdata.mod[settings["rna_mod"]]
    rna.obs[LABEL] = table["label"].to_numpy()
    if "dose" in table:
        rna.obs[DOSE] = table["dose"].to_numpy()
    for key in settings["obs_keys"]:
        if key not in rna.obs and key in mdata.obs:
            rna.obs[key] = mdata.obs.loc[rna.obs_names, key]
    return rna
