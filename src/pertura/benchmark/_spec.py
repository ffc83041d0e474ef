"""How a benchmark makes a trained model: class and arguments, or any function of the training cells."""

from __future__ import annotations

import ast
import hashlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from anndata import AnnData

_BASES = ("PerturbationModel", "Baseline")


class Predictor(Protocol):
    """What a trained model must be able to do; ``get_perturbation_effect`` as well, if it has intervals."""

    def predict_perturbation(self, perturbation: str, **kwargs: Any) -> AnnData | None:
        """As :meth:`pertura.model.PerturbationModel.predict_perturbation`."""


Factory = Callable[..., Predictor]
"""``factory(adata, *, setup, seed)`` -> trained model; `setup` holds the arguments of ``setup_anndata``."""


@dataclass(frozen=True)
class ModelSpec:
    """A model class and its arguments.

    Parameters
    ----------
    cls
        Class with the methods of :class:`pertura.model.PerturbationModel`.
    setup, init, train, predict
        Arguments of ``setup_anndata`` (beside the data's columns), of the class, of ``train``, and of
        ``predict_perturbation`` and ``get_perturbation_effect``.
    stochastic
        Whether runs with different seeds differ; otherwise one run is enough.

    Examples
    --------
    >>> ModelSpec(pertura.model.PertVAE, init={"n_latent": 10}, train={"max_epochs": 50})
    """

    cls: type
    setup: Mapping[str, Any] = field(default_factory=dict)
    init: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)
    predict: Mapping[str, Any] = field(default_factory=dict)
    stochastic: bool = True

    def __call__(self, adata: AnnData, *, setup: Mapping[str, Any], seed: int) -> Predictor:
        """Train on `adata`; its random state is the seed's, the global one is left as it was."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.cls.setup_anndata(adata, **{**setup, **self.setup})
            model = self.cls(adata, **self.init)
            model.train(**{"seed": seed, **_no_bar(model.train), **self.train})
        return model


def _no_bar(train: Callable[..., Any]) -> dict[str, bool]:
    """Turn a trainer's progress bar off: a benchmark has one of its own."""
    return {"enable_progress_bar": False} if "trainer_kwargs" in inspect.signature(train).parameters else {}


def resolve_models(models: Mapping[str, Any], add_baselines: bool) -> dict[str, Factory]:
    """Models by name, classes wrapped, baselines of the package in front."""
    if not isinstance(models, Mapping):
        raise ValueError(f"`models` must be a dict of names and models, got {type(models).__name__}.")
    chosen: dict[str, Factory] = dict(baselines()) if add_baselines else {}
    for name, model in models.items():
        if not callable(model):
            raise ValueError(f"`models`: {name!r} is a {type(model).__name__}; pass a ModelSpec, class or function.")
        chosen[str(name)] = ModelSpec(model) if isinstance(model, type) else model
    if not chosen:
        raise ValueError("`models` is empty; name at least one model, or pass `baselines=True`.")
    return chosen


def baselines() -> dict[str, ModelSpec]:
    """No change, the mean effect, and the mean effect weighted by how similar the contexts are."""
    from pertura import baseline

    names = ("NoChange", "MeanEffect", "WeightedMeanEffect")
    return {name: ModelSpec(getattr(baseline, name), stochastic=False) for name in names}


def parse_model(text: str) -> tuple[str, ModelSpec]:
    """Name and specification of a model written as text.

    Parameters
    ----------
    text
        Name of a class in :mod:`pertura.model` or :mod:`pertura.baseline`, followed by arguments after a colon:
        ``"PertVAE"``, ``"PertVAE:preset=paper"``, ``"PertVAE:n_latent=10,train.max_epochs=20"``. A leading
        ``setup.``, ``train.`` or ``predict.`` names the function the argument is of; without it, the class.
    """
    from pertura import baseline, model

    name, _, rest = text.partition(":")
    known = {n: (m, getattr(m, n)) for m in (model, baseline) for n in m.__all__ if n not in _BASES}
    known = {n: (m, cls) for n, (m, cls) in known.items() if hasattr(cls, "setup_anndata")}
    if name not in known:
        raise ValueError(f"`models`: there is no model {name!r}; choose from {sorted(known)}.")
    module, cls = known[name]
    arguments: dict[str, dict[str, Any]] = {"setup": {}, "init": {}, "train": {}, "predict": {}}
    for item in filter(None, rest.split(",")):
        key, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"`models`: {item!r} in {text!r} is not of the form argument=value.")
        group, _, argument = key.strip().rpartition(".")
        if (group or "init") not in arguments:
            raise ValueError(f"`models`: {group!r} in {text!r} must be one of setup, train, predict.")
        arguments[group or "init"][argument] = _literal(value.strip())
    return text, ModelSpec(cls, **arguments, stochastic=module is model)


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def digest(*parts: Any) -> str:
    """Short fingerprint of settings, so that a results file is not continued with others."""
    described = []
    for part in parts:
        if isinstance(part, ModelSpec):
            described.append(
                (part.cls.__module__, part.cls.__qualname__, part.setup, part.init, part.train, part.predict)
            )
        elif callable(part):
            described.append((getattr(part, "__module__", ""), getattr(part, "__qualname__", type(part).__qualname__)))
        else:
            described.append(part)
    return hashlib.sha256(repr(described).encode()).hexdigest()[:8]
