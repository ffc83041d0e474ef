"""Checks of what is registered with a model; after an error the data are as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pandas as pd
from anndata import AnnData
from mudata import MuData

from pertura.data import _mudata
from pertura.data._cells import Expression
from pertura.data._constants import EFFECTS, KEYS
from pertura.data._diagnostics import warn_at_setup
from pertura.data._validation import (
    check_doses,
    check_expression,
    check_features,
    check_names,
    check_obs_key,
    check_perturbations,
    check_size_factor,
)
from pertura.data._vocabulary import parse_label

_OURS = ("_scvi", "_pertura")


def check_values(name: str, args: dict[str, Any], takes_effects: bool) -> None:
    """Check what rows are, and name the control that rows of effects do without."""
    values = args.get("values", "expression")
    if values not in ("expression", EFFECTS):
        raise ValueError(f"`values` must be 'expression' (of cells) or 'effects' (of conditions), got {values!r}.")
    if values == EFFECTS and not takes_effects:
        raise ValueError(
            f"`values`: {name} learns from single cells and can not be trained on effects. model.PerturbX and the baselines "
            "(such as baseline.MeanEffect and baseline.TwoWayAdditive) can."
        )
    if args["control"] is None:
        if values != EFFECTS:
            raise ValueError("`control`: name the label of unperturbed cells; only values='effects' does without.")
        args["control"] = "control"
    if values == EFFECTS and args["size_factor_key"] is not None:
        raise ValueError("`size_factor_key`: effects have no library. Leave it out, or use values='expression'.")


def check_new(adata: AnnData, args: dict[str, Any], perturbation_optional: bool) -> pd.DataFrame | None:
    """Check data that a new model is to be made of.

    Returns
    -------
    Features of perturbations, where they are registered.
    """
    check_names(adata)
    kind = check_expression(adata, args["layer"])
    key, control, delimiter = args["perturbation_key"], args["control"], args["delimiter"]
    effects = args.get("values") == EFFECTS
    if key is None and perturbation_optional:
        if args["dose_key"] is not None:
            raise ValueError("`dose_key` needs `perturbation_key`: name the column that says what was dosed.")
    else:
        check_perturbations(adata, key, control, delimiter, effects)
    check_doses(adata, args["dose_key"], key, control, delimiter)
    for name in ("context_key", "batch_key"):
        check_obs_key(adata, name, args[name])
        if args[name] is not None and args[name] == key:
            raise ValueError(f"`{name}` and `perturbation_key` are both {key!r}. Name two different columns.")
    check_size_factor(adata, args["size_factor_key"], kind)
    labels = () if key is None else adata.obs[key].astype(str).unique()
    names = sorted({m for label in labels for m in parse_label(label, control, delimiter)})
    features = check_features(adata, args["perturbation_features_key"], names)
    if key is not None and not effects:
        warn_at_setup(adata, args, kind)
    return features


def check_known(adata: AnnData, args: dict[str, Any], source: dict[str, Any]) -> pd.DataFrame | None:
    """Check data that a saved model is loaded with: the model's names, codes and features stay.

    Returns
    -------
    Features of perturbations of the saved model.
    """
    states = {key: entry["state_registry"] for key, entry in source["field_registries"].items()}
    kind = check_expression(adata, args["layer"])
    Expression.of(adata, args["layer"], states[KEYS.X]["column_names"], kind)
    for name in ("perturbation_key", "dose_key", "context_key", "batch_key"):
        check_obs_key(adata, name, args[name])
    check_doses(adata, args["dose_key"], args["perturbation_key"], args["control"], args["delimiter"])
    check_size_factor(adata, args["size_factor_key"], states[KEYS.X]["data_kind"])
    for name, key in (("context_key", KEYS.CONTEXT), ("batch_key", KEYS.BATCH)):
        if args[name] is None:
            continue
        known = list(states[key]["categorical_mapping"])
        new = [v for v in adata.obs[args[name]].unique() if v not in known]
        if new:
            raise ValueError(
                f"`adata`: {new[0]!r} in `obs[{args[name]!r}]` was not in training. Load the model with "
                "`adata=False`, and pass these cells to `predict_perturbation(adata=...)`."
            )
    return states[KEYS.PERTURBATION]["features"]


@contextmanager
def restored_on_error(adata: AnnData) -> Iterator[None]:
    """Put back what registration adds to an AnnData, should it fail."""
    slots = {name: getattr(adata, name) for name in ("obs", "obsm", "uns")}
    before = {name: {k: slot[k] for k in list(slot.keys()) if str(k).startswith(_OURS)} for name, slot in slots.items()}
    try:
        yield
    except BaseException:
        for name, kept in before.items():
            slot = getattr(adata, name)
            for key in [k for k in slot.keys() if str(k).startswith(_OURS) and k not in kept]:
                del slot[key]
            for key, value in kept.items():
                slot[key] = value
        raise


def registered_modality(mdata: MuData) -> AnnData:
    """The modality that ``setup_mudata`` registered."""
    for modality in mdata.mod.values():
        if "_scvi_manager_uuid" in modality.uns and _mudata.LABEL in modality.obs:
            return modality
    raise ValueError("`adata`: this MuData was not set up. Call `setup_mudata` first.")
