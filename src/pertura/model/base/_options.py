"""Options of models: a frozen dataclass each, whose defaults are those of the signature and of the documentation."""

from __future__ import annotations

import inspect
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from typing import Any, Literal

from ._arguments import check_flag, check_number, check_whole, check_widths


def option(
    default: Any,
    *,
    one_of: tuple[Any, ...] | None = None,
    whole: int | None = None,
    least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    flag: bool = False,
    widths: bool = False,
) -> Any:
    """Field of an options dataclass, with what its values may be; `None` is allowed where the annotation has it.

    Parameters
    ----------
    default
        Default value.
    one_of
        Values that are allowed.
    whole
        A whole number of at least this.
    least, above, below
        A number within these limits.
    flag
        True or False.
    widths
        A sequence of widths of layers.
    """
    limits = {"one_of": one_of, "whole": whole, "least": least, "above": above, "below": below}
    return field(default=default, metadata={**limits, "flag": flag, "widths": widths})


@dataclass(frozen=True)
class Options:
    """Base of the options of a model."""

    def __post_init__(self) -> None:
        for own in fields(self):
            value = getattr(self, own.name)
            if value is None and "None" in str(own.type):
                continue
            _check(own, value)


@dataclass(frozen=True)
class TrainingOptions(Options):
    """Options of how a neural network is trained; signatures have them last."""

    lr: float = option(3e-3, above=0)
    lr_schedule: Literal["cosine", "constant"] = option("cosine", one_of=("cosine", "constant"))
    kl_warmup: float = option(0.2, least=0)
    n_steps: int = option(1500, whole=1)
    n_epochs: int = option(60, whole=1)


def _check(own: Field, value: Any) -> None:
    """Raise unless the value of one option is allowed."""
    rules = own.metadata
    if not rules:
        return
    if rules["one_of"] is not None and value not in rules["one_of"]:
        allowed = ", ".join(map(repr, rules["one_of"]))
        raise ValueError(f"`{own.name}` must be one of {allowed}, got {value!r}.")
    if rules["whole"] is not None:
        check_whole(own.name, value, least=rules["whole"])
    if any(rules[name] is not None for name in ("least", "above", "below")):
        check_number(own.name, value, least=rules["least"], above=rules["above"], below=rules["below"])
    if rules["flag"]:
        check_flag(own.name, value)
    if rules["widths"]:
        check_widths(own.name, value)


def resolve(
    options_cls: type[Options], presets: dict[str, dict[str, Any]], preset: Any, given: dict[str, Any], model: str
) -> Options:
    """Options of a model: defaults, then those of the preset, then those given.

    Raises
    ------
    ValueError
        For an unknown preset and for values that are not allowed.
    TypeError
        For an option that the model does not have.
    """
    if preset is not None and preset not in presets:
        known = " or ".join(map(repr, presets)) or "there is none"
        raise ValueError(f"`preset` must be {known}, or None, got {preset!r}.")
    known = [own.name for own in fields(options_cls)]
    wrong = [name for name in given if name not in known]
    if wrong:
        raise TypeError(f"{model}() got an unexpected option {wrong[0]!r}. Its options are {', '.join(known)}.")
    return replace(options_cls(), **{**presets.get(preset, {}), **given})


def signature_with(options_cls: type[Options], presets: dict[str, dict[str, Any]]) -> inspect.Signature:
    """Signature of a model's ``__init__``: data, registry, and every option with its default."""
    positional, keyword = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    parameters = [inspect.Parameter("self", positional)]
    for name, annotation in (("adata", "AnnData | None"), ("registry", "dict | None")):
        parameters.append(inspect.Parameter(name, positional, default=None, annotation=annotation))
    last = {own.name for own in fields(TrainingOptions)}
    for own in sorted(fields(options_cls), key=lambda own: own.name in last):
        default = own.default_factory() if own.default is MISSING else own.default
        parameters.append(inspect.Parameter(own.name, keyword, default=default, annotation=own.type))
    if presets:
        annotation = f"Literal[{', '.join(map(repr, presets))}] | None"
        parameters.append(inspect.Parameter("preset", keyword, default=None, annotation=annotation))
    return inspect.Signature(parameters)
