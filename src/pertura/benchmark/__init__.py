"""Models against baselines and the technical ceiling of the data, on held-out perturbations, contexts and doses.

:func:`run` trains and scores, :func:`summarise` says how much of the gap between the mean effect and the
ceiling each model closes; :func:`pertura.pl.benchmark` draws it. On the command line: ``python -m
pertura.benchmark kang``.
"""

from ._compounds import run_compounds, summarise_compounds
from ._dataset import Dataset, make_splits
from ._doses import run_doses
from ._drug_targets import drug_targets
from ._effects import effect_calibration, measured_effect
from ._few_cells import few_cells_splits, papalexi_screen, run_few_cells, summarise_few_cells
from ._grn import GRN_SPLITS, GivenNetwork, NetworkModel, Scorer, beeline_data, grn_models, run_grn, summarise_grn
from ._grn_model import grn_knockouts, grn_speed, summarise_knockouts
from ._l1000 import run_l1000, summarise_l1000
from ._norman import norman_pairs, norman_screen, norman_singles
from ._planted import run_planted, summarise_planted
from ._runner import DEFAULT_METRICS, run
from ._screens import Screen, ht115_screen, tggates_conditions, tggates_screen
from ._spec import ModelSpec, baselines, parse_model
from ._speed import run_speed
from ._summary import summarise

__all__ = [
    "DEFAULT_METRICS",
    "GRN_SPLITS",
    "Dataset",
    "GivenNetwork",
    "ModelSpec",
    "NetworkModel",
    "Scorer",
    "Screen",
    "baselines",
    "beeline_data",
    "drug_targets",
    "effect_calibration",
    "few_cells_splits",
    "grn_knockouts",
    "grn_models",
    "grn_speed",
    "ht115_screen",
    "make_splits",
    "measured_effect",
    "papalexi_screen",
    "norman_pairs",
    "norman_screen",
    "norman_singles",
    "parse_model",
    "run",
    "run_compounds",
    "run_doses",
    "run_few_cells",
    "run_grn",
    "run_l1000",
    "run_planted",
    "run_speed",
    "summarise",
    "summarise_compounds",
    "summarise_few_cells",
    "summarise_grn",
    "summarise_knockouts",
    "summarise_l1000",
    "summarise_planted",
    "tggates_conditions",
    "tggates_screen",
]
