"""Where results go, and what may not be touched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray

from pertura.data._perturbation import Perturbation, tells_doses
from pertura.effects._ranked import ranked_effects

if TYPE_CHECKING:
    from ._predict import Predicted

PROVENANCE = "pertura"
PREDICTION = "prediction"  # key of the provenance in an AnnData that pertura made


@cache
def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("pertura", "scvi-tools", "torch", "pyro-ppl", "anndata")}


def provenance(model: Any, **asked: Any) -> dict[str, Any]:
    """What was asked, of which model, in a form that h5ad stores."""
    return {
        "by": PROVENANCE,
        "model": type(model).__name__,
        "model_summary": str(getattr(model, "_model_summary_string", "")),
        "versions": dict(_versions()),
        **{k: ("" if v is None else v) for k, v in asked.items()},
    }


def targets(key: str, ci: float | None) -> dict[str, list[str]]:
    """Keys that a prediction under `key` writes, by slot."""
    ends = [f"{key}_low", f"{key}_high"] if ci is not None else []
    return {"layers": [key, *ends], "obsm": [f"X_{key}", "X_basal"], "uns": [key, f"{key}_effect"]}


def _written(adata: AnnData) -> dict[str, list[str]]:
    """What earlier calls wrote, ``"slot/key"`` by key of their provenance."""
    return {
        key: [str(w) for w in entry.get("wrote", ())]
        for key, entry in adata.uns.items()
        if isinstance(entry, Mapping) and str(entry.get("by", "")) == PROVENANCE
    }


def reserve(adata: AnnData, wanted: Mapping[str, list[str]], overwrite: bool) -> None:
    """Raise where a key holds something that is not pertura's own.

    Parameters
    ----------
    adata
        Where results will be written.
    wanted
        Keys by slot, such as ``{"layers": ["stim"]}``.
    overwrite
        Whether the user allowed it.
    """
    if overwrite:
        return
    own = {w for written in _written(adata).values() for w in written}
    taken = [
        f"adata.{slot}[{key!r}]"
        for slot, keys in wanted.items()
        for key in keys
        if key in getattr(adata, slot) and f"{slot}/{key}" not in own
    ]
    if taken:
        raise ValueError(
            f"`key_added`: {', '.join(taken)} exists and was not written by pertura. "
            "Choose another `key_added`, or pass `overwrite=True`."
        )


def clear(adata: AnnData, key: str) -> None:
    """Remove what an earlier call wrote under the same key, such as intervals that are not asked this time."""
    written = _written(adata)
    others = {w for name, own in written.items() if name != key for w in own}
    for entry in set(written.get(key, ())) - others:
        slot, _, name = entry.partition("/")
        if name in getattr(adata, slot):
            del getattr(adata, slot)[name]


def write(
    model: Any,
    user: AnnData,
    rows: NDArray[np.int64],
    key: str,
    predicted: Predicted,
    table: pd.DataFrame,
    asked: dict[str, Any],
) -> None:
    """Put one prediction into the user's AnnData; rows that were not predicted are NaN."""
    clear(user, key)
    genes = pd.Index(user.var_names.astype(str)).get_indexer(model.gene_names)
    everything = len(rows) == user.n_obs and np.array_equal(rows, np.arange(user.n_obs))
    in_order = len(genes) == user.n_vars and np.array_equal(genes, np.arange(user.n_vars))
    for end, values in (("", predicted.mean), ("_low", predicted.low), ("_high", predicted.high)):
        if values is None:
            continue
        if everything and in_order:
            layer = values[0]
        else:
            layer = np.full(user.shape, np.nan, np.float32)
            layer[np.ix_(rows, genes)] = values[0]
        user.layers[key + end] = layer
    for name, values in ((f"X_{key}", predicted.latent[0]), ("X_basal", predicted.basal[0])):
        matrix = np.full((user.n_obs, values.shape[1]), np.nan, np.float32)
        matrix[rows] = values
        user.obsm[name] = matrix
    context_key = model.registered.argument("context_key")
    params = {
        "groupby": context_key or model.registered.argument("perturbation_key") or "perturbation",
        "reference": model.vocabulary.control,
        "method": f"pertura.{type(model).__name__}",
        "use_raw": False,
        "layer": key,
        "corr_method": "false sign rate",
    }
    user.uns[f"{key}_effect"] = ranked_effects(table, "context" if context_key else "perturbation", params)
    slots = targets(key, None if predicted.low is None else 1.0)
    wrote = [f"{slot}/{name}" for slot, names in slots.items() for name in names]
    user.uns[key] = provenance(model, wrote=wrote, **asked)


def frame(
    model: Any,
    user: AnnData,
    rows: NDArray[np.int64],
    perturbations: Sequence[Perturbation],
    novelty: NDArray[np.object_],
    asked: dict[str, Any],
) -> AnnData:
    """New AnnData, without expression, with one row per perturbation and cell, perturbations one after the other.

    Parameters
    ----------
    novelty
        Of each perturbation and cell, ``(n_perturbations, n_cells)``.
    """
    n, n_cells, has_dose = len(perturbations), len(rows), tells_doses(model.vocabulary, perturbations)
    own = user.obs.iloc[rows]
    own = own[[c for c in own.columns if not str(c).startswith(("_scvi", "_pertura"))]]
    obs = own.iloc[np.tile(np.arange(n_cells), n)].copy()
    labels = np.repeat(np.array([q.label for q in perturbations], dtype=object), n_cells)
    doses = np.repeat(np.array([q.dose_text for q in perturbations], dtype=object), n_cells)
    columns = {
        "perturbation": (model.registered.argument("perturbation_key") or "perturbation", pd.Categorical(labels))
    }
    if has_dose:
        columns["dose"] = (model.registered.argument("dose_key") or "dose", doses)
    names = obs.index.to_numpy()
    for name, (key, values) in columns.items():
        # the predicted perturbation goes where the user looks for it, the measured one stays beside it
        for column in dict.fromkeys((name, name if str(key).startswith("_pertura") else key)):
            if column in obs:
                obs[f"{column}_measured"] = obs[column].array
            obs[column] = values
    obs["cell"] = names
    obs["novelty"] = pd.Categorical(novelty.ravel())
    if n > 1:
        suffix = labels + ("@" + doses if has_dose else "")
        obs.index = names.astype(str).astype(object) + "-" + suffix
    genes = pd.Index(user.var_names.astype(str)).get_indexer(model.gene_names)
    out = AnnData(obs=obs, var=user.var.iloc[genes].copy())
    out.uns[PREDICTION] = provenance(model, wrote=[], **asked)
    return out


def fill(out: AnnData, predicted: Predicted) -> AnnData:
    """Put predictions into the AnnData that was made for them."""
    flat = {name: array.reshape(-1, array.shape[-1]) for name, array in predicted.items()}
    out.X = flat["mean"]
    for end in ("low", "high"):
        if end in flat:
            out.layers[end] = flat[end]
    out.obsm["X_latent"] = flat["latent"]
    out.obsm["X_basal"] = np.tile(flat["basal"], (len(predicted.mean), 1))
    return out


def contexts_as_anndata(
    model: Any, user: AnnData, table: pd.DataFrame, n_cells: pd.Series, asked: dict[str, Any]
) -> AnnData:
    """New AnnData with one row per perturbation and context.

    Parameters
    ----------
    table
        Effects, all genes of a row one after the other.
    n_cells
        Cells asked, by context.
    """
    shape = (-1, len(model.gene_names))
    first = table.iloc[:: shape[1]].reset_index(drop=True)
    keys = {"perturbation": "perturbation_key", "context": "context_key", "dose": "dose_key"}
    obs = pd.DataFrame(index=pd.RangeIndex(len(first)))
    for name in (name for name in keys if name in first):
        # under its plain name, and under the user's own
        for column in dict.fromkeys((name, model.registered.argument(keys[name]) or name)):
            if not str(column).startswith("_pertura"):
                obs[column] = pd.Categorical(first[name].astype(str))
    obs["novelty"] = pd.Categorical(first["novelty"])
    obs["n_cells"] = first["context"].map(n_cells).to_numpy()
    label = first["perturbation"].astype(str) + ("@" + first["dose"].astype(str) if "dose" in first else "")
    obs.index = pd.Index(first["context"].astype(str) + "-" + label, dtype=object, name=None)

    def values(column: str) -> np.ndarray:
        return table[column].to_numpy(np.float32).reshape(shape)

    genes = pd.Index(user.var_names.astype(str)).get_indexer(model.gene_names)
    least = 0.0 if model.registered.nonnegative else -np.inf
    out = AnnData(X=np.maximum(values("mean_perturbed"), least), obs=obs, var=user.var.iloc[genes].copy())
    out.layers["control"], out.layers["effect"] = values("mean_control"), values("lfc_mean")
    if asked["ci"] is not None:
        for end in ("low", "high"):
            out.layers[end] = np.maximum(out.layers["control"] + values(f"ci_{end}"), least)
    out.uns[PREDICTION] = provenance(model, wrote=[], **asked)
    return out
