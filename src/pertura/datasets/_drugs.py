"""Drug screens of bulk expression, and what is known about drugs."""

from __future__ import annotations

import numpy as np
import pandas as pd
from anndata import AnnData

from ._common import as_categories, as_names, describe, new_log
from ._fetch import fetch
from ._r import read_rda, to_experiment, to_frame

__all__ = ["lincs_l1000_ht115", "repurposing_hub", "tggates_hepatocytes"]

CONTROL = "control"
_LABELS = {
    "perturbation_key": "perturbation",
    "control": CONTROL,
    "dose_key": "dose",
    "context_key": "cell_type",
}


def lincs_l1000_ht115() -> AnnData:
    """L1000 profiles of HT115 cells, 6 hours after 349 compounds.

    681 profiles x 978 landmark genes; 661 treated, 20 with vehicle (DMSO), on two plates.

    Returns
    -------
    AnnData, profiles x genes. ``X``: level-3 log2 expression, float32, dense; no counts exist. ``obs``:
    ``perturbation`` (compound, ``"control"`` for DMSO), ``dose`` (0.04 to 177.6 micromolar, 0 in controls),
    ``time`` (hours), ``cell_type``, ``batch`` (plate), ``well``, ``pert_id`` (five compounds have two: their
    batches), ``smiles``, ``paired_control_index`` (name of the control profile that the source paired with
    each profile; controls: their own). The source paired at random over both plates: for half of the profiles
    the paired control is of the other plate. ``var``: ``title``; gene symbols are the names.

    Raises
    ------
    DataNotAvailable
        Neither cache nor network has the file.
    ValueError
        A paired control is not a control profile of the data.

    References
    ----------
    Subramanian et al. 2017, Cell 171:1437-1452; subset made by PRnet (Qi et al. 2024, Nat Commun 15:9256).
    """
    from anndata import read_h5ad

    source = read_h5ad(fetch("lincs_l1000_ht115"))
    old = source.obs
    is_control = old["control"].to_numpy() == 1
    obs = pd.DataFrame(
        {
            "perturbation": as_categories(np.where(is_control, CONTROL, old["condition"].astype(str))),
            "dose": old["dose"].to_numpy(float),
            "time": old["pert_time"].to_numpy(float),
            "cell_type": as_categories(old["cell_type"]),
            "batch": as_categories(old["rna_plate"]),
            "well": as_categories(old["rna_well"]),
            "pert_id": as_categories(old["pert_id"]),
            "smiles": as_categories(old["canonical_smiles"]),
            "paired_control_index": as_categories(old["paired_control_index"]),
        },
        index=as_names(source.obs_names),
    )
    _check_pairs(obs)
    var = (
        source.var[["pr_gene_title"]]
        .astype(str)
        .rename(columns={"pr_gene_title": "title"})
        .set_index(as_names(source.var_names))
    )
    dataset = describe("lincs_l1000_ht115", dose_unit="uM", vehicle="DMSO", **_LABELS)
    return new_log(np.asarray(source.X), obs=obs, var=var, dataset=dataset, scale="log2")


def tggates_hepatocytes() -> AnnData:
    """Human hepatocytes in culture, 2, 8 and 24 hours after 146 compounds (Open TG-GATEs).

    2,382 arrays x 196 genes: every compound is one experiment with its own controls, in two replicates.

    Returns
    -------
    AnnData, arrays x genes. ``X``: log2 expression, float32, dense; no counts exist. ``obs``:
    ``perturbation`` (compound, ``"control"`` for the arrays without), ``compound`` (of the experiment, also
    in controls), ``dose_level`` (``"Control" < "Low" < "Middle" < "High"``), ``dose`` (concentration as in
    the source, which does not say the unit; micromolar for most compounds; 0 in controls), ``time`` (hours),
    ``cell_type``, ``replicate``, ``batch`` (lot of hepatocytes, of one donor each), ``sex`` (of the donor),
    ``exp_id``, ``paired_control_index`` (name of the control array of the same experiment, time and
    replicate; controls: their own), ``dna`` and ``ldh`` (DNA content and LDH activity, percent of control;
    missing for some). ``var``: ``probe``, ``entrez``, ``transcript``; gene symbols are the names.

    Raises
    ------
    DataNotAvailable
        Neither cache nor network has the file.
    ValueError
        A treated array has not exactly one control of the same experiment, time and replicate.

    References
    ----------
    Igarashi et al. 2015, Nucleic Acids Res 43:D921-D927; subset of the package ToxicoGx.
    """
    source = read_rda(fetch("tggates_hepatocytes"))["TGGATESsmall"].molecularProfiles["rna"]
    experiment = to_experiment(source)
    old = experiment.obs
    is_control = (old["dose_level"] == "Control").to_numpy()
    obs = pd.DataFrame(
        {
            "perturbation": as_categories(np.where(is_control, CONTROL, old["treatmentid"])),
            "compound": as_categories(old["treatmentid"]),
            "dose_level": pd.Categorical(
                old["dose_level"], categories=["Control", "Low", "Middle", "High"], ordered=True
            ),
            "dose": old["concentration"].astype(float),
            "time": old["duration"].astype(float),
            "cell_type": as_categories(old["sampleid"]),
            "replicate": as_categories(old["individual_id"]),
            "batch": as_categories(old["batchid"]),
            "sex": as_categories(old["sex_type"]),
            "exp_id": as_categories(old["exp_id"]),
            "dna": old["DNA"].astype(float),
            "ldh": old["LDH"].astype(float),
        },
        index=as_names(old["samplename"]),
    )
    match = ["exp_id", "time", "replicate"]
    controls = obs.loc[is_control, match].reset_index(names="paired_control_index")
    paired = obs[match].merge(controls, on=match, how="left", validate="many_to_one")["paired_control_index"]
    obs["paired_control_index"] = as_categories(paired)
    _check_pairs(obs)
    var = to_frame(source.elementMetadata)
    var = pd.DataFrame(
        {
            "probe": var["gene_id"].to_numpy(),
            "entrez": var["EntrezGene.ID"].astype(str).to_numpy(),
            "transcript": var["transcript_id"].to_numpy(),
        },
        index=as_names(var["Symbol"]),
    )
    expression = np.asarray(experiment.assays["exprs"]).T
    dataset = describe("tggates_hepatocytes", **_LABELS)
    return new_log(expression, obs=obs, var=var, dataset=dataset, scale="log2")


def _check_pairs(obs: pd.DataFrame) -> None:
    controls = obs.index[obs["perturbation"] == CONTROL]
    bad = ~obs["paired_control_index"].isin(controls)
    if bad.any():
        raise ValueError(
            f"`paired_control_index` of {int(bad.sum())} profiles names no control profile of the data, e.g. "
            f"of {obs.index[bad][0]!r}."
        )


def repurposing_hub() -> pd.DataFrame:
    """Mechanism, targets and indication of 6,798 drugs (Drug Repurposing Hub, 2020-03-24).

    Returns
    -------
    One row per drug, index ``perturbation`` (name in lower case mostly, as L1000 has them):
    ``clinical_phase``, ``moa``, ``target`` (gene symbols), ``disease_area``, ``indication``; several values
    are joined by ``|``, missing ones are empty strings. ``attrs["dataset"]``: provenance. The Hub asks for
    non-commercial use.

    Raises
    ------
    DataNotAvailable
        Neither cache nor network has the file.

    References
    ----------
    Corsello et al. 2017, Nat Med 23:405-408.
    """
    table = pd.read_csv(fetch("repurposing_hub"), sep="\t", comment="!", dtype=str, keep_default_na=False)
    table = table.rename(columns={"pert_iname": "perturbation"}).set_index("perturbation")
    table.attrs["dataset"] = describe("repurposing_hub")
    return table
