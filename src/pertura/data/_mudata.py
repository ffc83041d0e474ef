"""MuData whose second modality says what was done: cells x perturbations (gRNAs, drugs with doses)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from mudata import MuData
from scipy import sparse

LABEL, DOSE = "_pertura_perturbation", "_pertura_dose"


def check_modality(mdata: Any, argument: str, key: Any) -> AnnData:
    """The named modality."""
    if not isinstance(mdata, MuData):
        raise ValueError(f"`mdata` must be a MuData, got {type(mdata).__name__}. Use `setup_anndata` for an AnnData.")
    if not isinstance(key, str) or key not in mdata.mod:
        raise ValueError(f"`{argument}`: {key!r} is not a modality of `mdata`, which has {', '.join(mdata.mod)}.")
    return mdata.mod[key]


def check_settings(settings: dict[str, Any]) -> None:
    """Raise where an argument of ``setup_mudata`` could not be used with any data."""
    if settings["values"] not in ("presence", "dose"):
        raise ValueError(f"`values` must be 'presence' or 'dose', got {settings['values']!r}.")
    threshold = settings["threshold"]
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float, np.number)) or not threshold >= 0:
        raise ValueError(f"`threshold` must be a number that is not negative, got {threshold!r}.")
    for name in ("control", "delimiter"):
        if not isinstance(settings[name], str) or not settings[name]:
            raise ValueError(f"`{name}` must be a non-empty string, got {settings[name]!r}.")


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
    names = _perturbation_names(applied, settings)
    rows = applied.obs_names.get_indexer(cells)
    if (rows < 0).any():
        raise ValueError(
            f"`perturbation_mod`: {int((rows < 0).sum())} of {len(cells)} cells of {settings['rna_mod']!r} are not in "
            f"{settings['perturbation_mod']!r}. Subset `mdata` to the cells that both modalities have."
        )
    layer = settings["perturbation_layer"]
    if layer is not None and (not isinstance(layer, str) or layer not in applied.layers):
        raise ValueError(f"`perturbation_layer`: {layer!r} is not a layer of {settings['perturbation_mod']!r}.")
    values = sparse.coo_matrix((applied.X if layer is None else applied.layers[layer])[rows])
    if not np.isfinite(values.data).all():
        raise ValueError(f"`perturbation_mod`: {settings['perturbation_mod']!r} holds NaN or infinite values.")
    table = pd.DataFrame({"cell": values.row, "name": names[values.col], "dose": values.data})
    table = table[(table["dose"] > settings["threshold"]) & (table["name"] != settings["control"])]
    # several gRNAs of one target are one perturbation
    table = table.groupby(["cell", "name"], as_index=False, sort=True)["dose"].max()
    # through text: the float32 0.1 is the dose 0.1, not 0.100000001
    texts = {number: f"{float(str(number)):.9g}" for number in table["dose"].unique()}
    table["dose"] = table["dose"].map(texts).astype(object)
    several = table["cell"].duplicated(keep=False)
    joined = table[several].groupby("cell")[["name", "dose"]].agg(settings["delimiter"].join)
    joined = pd.concat([table[~several].set_index("cell"), joined]).reindex(np.arange(len(cells)))
    out = pd.DataFrame({"label": joined["name"].fillna(settings["control"]).to_numpy(object)}, index=cells)
    if settings["values"] == "dose":
        out["dose"] = joined["dose"].fillna("0").to_numpy(object)
    return out


def _perturbation_names(applied: AnnData, settings: dict[str, Any]) -> np.ndarray:
    key = settings["target_key"]
    if key is None:
        return applied.var_names.to_numpy(dtype=object)
    if not isinstance(key, str) or key not in applied.var:
        raise ValueError(
            f"`target_key`: {key!r} is not a column of `mdata[{settings['perturbation_mod']!r}].var` "
            f"({', '.join(map(str, applied.var.columns)) or 'no columns'})."
        )
    missing = int(applied.var[key].isna().sum())
    if missing:
        raise ValueError(
            f"`target_key`: {missing} perturbations have no value in {key!r}. "
            f"Give non-targeting gRNAs the target {settings['control']!r}."
        )
    return applied.var[key].astype(str).to_numpy(dtype=object)


def annotations(mdata: MuData, settings: dict[str, Any]) -> pd.DataFrame:
    """Columns that ``obs`` of the expression modality lacks: ``_pertura_*``, and those of ``mdata.obs``."""
    table = perturbations_of_matrix(mdata, settings)
    columns: dict[str, Any] = {LABEL: table["label"].to_numpy(object)}
    if "dose" in table:
        columns[DOSE] = table["dose"].to_numpy(object)
    rna = mdata.mod[settings["rna_mod"]]
    for key in settings["obs_keys"]:
        if key not in rna.obs and key in mdata.obs:
            columns[key] = mdata.obs.loc[rna.obs_names, key].array
    return pd.DataFrame(columns, index=rna.obs_names)
