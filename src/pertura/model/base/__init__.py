"""What every model shares: registration, training, prediction, and where results go."""

from ._model import PerturbationModel, SetupKey
from ._options import Options, option

__all__ = ["Options", "PerturbationModel", "SetupKey", "option"]
