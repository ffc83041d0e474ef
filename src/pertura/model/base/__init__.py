"""What every model shares: registration, training, prediction, and where results go."""

from ._artifact import ArtifactModel, ArtifactOptions
from ._grn import GeneNetwork, GRNModel
from ._model import PerturbationModel, SetupKey
from ._options import Options, TrainingOptions, option

__all__ = [
    "ArtifactModel",
    "ArtifactOptions",
    "GRNModel",
    "GeneNetwork",
    "Options",
    "PerturbationModel",
    "SetupKey",
    "TrainingOptions",
    "option",
]
