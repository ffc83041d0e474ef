"""Every argument, tried wrong once: the message names it, and the data stay as they were."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields
from typing import Any

import numpy as np
import pandas as pd
import pytest

from pertura.model import PerturbationModel

from .conftest import SHARED

N = {"n_samples": 4}
SCREEN = {"perturbation_key": "perturbation", "control": "control", "layer": "counts"}


def prepared(adata):
    """Columns and tables that wrong arguments refer to."""
    n = adata.n_obs
    adata.obs["text"] = "high"
    adata.obs["negative"] = -1.0
    adata.obs["with_nan"] = np.where(np.arange(n) == 0, np.nan, 1.0)
    adata.obs["no_dose"] = 0.0
    adata.obs["too_many"] = "1+2+3"
    adata.obs["one"] = "control"
    adata.obs["one_batch"] = pd.Categorical(["a"] * n)
    adata.layers["nan"] = adata.layers["counts"] * np.nan
    adata.layers["fraction"] = adata.layers["counts"] * 0.5
    adata.uns["words"] = pd.DataFrame({"drug_class": ["a", "b"]}, index=["TF1", "TF3"])
    adata.uns["strangers"] = pd.DataFrame({"a": [1.0]}, index=["somebody"])
    adata.uns["list"] = [1, 2]
    adata.uns["with_nan"] = pd.DataFrame({"a": [np.nan]}, index=["TF1"])
    adata.uns["doubled"] = pd.DataFrame({"a": [1.0, 2.0]}, index=["TF1", "TF1"])
    return adata


WRONG_SETUP: list[tuple[str, Any]] = [
    ("perturbation_key", "absent"),
    ("perturbation_key", 3),
    ("perturbation_key", "with_nan"),
    ("perturbation_key", "one"),
    ("control", "Control"),
    ("control", None),
    ("layer", "absent"),
    ("layer", ["counts"]),
    ("layer", "nan"),
    ("context_key", "absent"),
    ("context_key", "with_nan"),
    ("context_key", "perturbation"),
    ("context_key", ("cell_type",)),
    ("dose_key", "absent"),
    ("dose_key", "text"),
    ("dose_key", "negative"),
    ("dose_key", "no_dose"),
    ("dose_key", "too_many"),
    ("batch_key", "absent"),
    ("batch_key", "with_nan"),
    ("size_factor_key", "absent"),
    ("size_factor_key", "text"),
    ("size_factor_key", "negative"),
    ("values", "ranks"),
    ("values", None),
    ("perturbation_features_key", "absent"),
    ("perturbation_features_key", 1),
    ("perturbation_features_key", "words"),
    ("perturbation_features_key", "strangers"),
    ("perturbation_features_key", "list"),
    ("perturbation_features_key", "with_nan"),
    ("perturbation_features_key", "doubled"),
    ("delimiter", ""),
    ("delimiter", None),
]


@pytest.mark.parametrize(("argument", "value"), WRONG_SETUP, ids=lambda v: str(v))
def test_setup_anndata(shared_spec, screen, unchanged, argument, value):
    adata = prepared(screen())
    with unchanged(adata), pytest.raises(ValueError, match=f"`{argument}`") as raised:
        shared_spec.cls.setup_anndata(adata, **{**SCREEN, argument: value})
    assert len(str(raised.value)) > 40


def test_setup_anndata_has_no_other_arguments(spec):
    """What is new is declared, with a check of its own, or tried wrong above."""
    shared = {"adata", "kwargs", *(argument for argument, _ in WRONG_SETUP)}
    own = set(inspect.signature(spec.cls.setup_anndata).parameters) - shared
    assert own <= {key.name for key in spec.cls._setup_keys}
    assert all(name in inspect.getdoc(spec.cls.setup_anndata) for name in own)


def test_setup_anndata_of_size_factors_without_counts(shared_spec, screen, unchanged):
    adata = prepared(screen())
    adata.obs["size"] = 1.0
    with unchanged(adata), pytest.raises(ValueError, match="`(size_factor_key|layer)`"):
        shared_spec.cls.setup_anndata(adata, **{**SCREEN, "layer": "fraction", "size_factor_key": "size"})


def test_setup_anndata_with_unknown_arguments(shared_spec, screen, unchanged):
    adata = screen()
    with unchanged(adata), pytest.raises(TypeError, match="contex_key"):
        shared_spec.cls.setup_anndata(adata, **SCREEN, contex_key="cell_type")


@pytest.mark.parametrize("what", ["frame", "view", "genes", "cells", "empty"])
def test_setup_anndata_of_wrong_data(shared_spec, screen, what):
    adata = screen()
    if what == "frame":
        adata = adata.obs
    elif what == "view":
        adata = adata[:50]
    elif what == "genes":
        adata.var_names = ["a", *adata.var_names[:-1].to_list()[:-1], "a"]
    elif what == "cells":
        adata.obs_names = ["a", *adata.obs_names[1:-1], "a"]
    else:
        adata = adata[:0].copy()
    with pytest.raises(ValueError, match="`adata`"):
        shared_spec.cls.setup_anndata(adata, **SCREEN)


def test_a_second_setup_that_fails_leaves_the_first(shared_spec, screen, unchanged):
    adata = prepared(screen())
    shared_spec.setup(adata)
    with unchanged(adata), pytest.raises(ValueError, match="`batch_key`"):
        shared_spec.cls.setup_anndata(adata, **SCREEN, batch_key="absent")
    shared_spec.make(adata)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"adata": None}, "`adata` or `registry` must be given"),
        ({"adata": None, "registry": {"a": 1}}, "registry"),
        ({"adata": None, "registry": "file"}, "got str as `registry`"),
        ({"adata": pd.DataFrame()}, "`adata` must be an AnnData or MuData, got DataFrame"),
    ],
)
def test_init(shared_spec, arguments, match):
    with pytest.raises(ValueError, match=match):
        shared_spec.cls(**arguments, **shared_spec.init)


def test_init_with_data_that_were_not_set_up(shared_spec, screen):
    with pytest.raises(ValueError, match="set up your AnnData"):
        shared_spec.cls(screen(), **shared_spec.init)


def wrong_value(own):
    """A value that an option must not have."""
    rules = own.metadata
    if rules["one_of"] is not None:
        return "nonsense"
    if rules["whole"] is not None:
        return rules["whole"] - 1
    for limit in ("above", "below"):
        if rules[limit] is not None:
            return rules[limit]
    if rules["least"] is not None:
        return rules["least"] - 1.0
    return "wrong" if rules["flag"] or rules["widths"] else ["no such gene"]


def test_options(spec, screen, unchanged):
    adata = screen()
    spec.setup(adata)
    for own in fields(spec.cls._options_cls):
        assert own.metadata, f"`{own.name}` has no rule"
        with unchanged(adata), pytest.raises(ValueError, match=f"`{own.name}"):
            spec.cls(adata, **{**spec.init, own.name: wrong_value(own)})
    with pytest.raises(ValueError, match="`preset`"):
        spec.cls(adata, **spec.init, preset="best")
    with pytest.raises(TypeError, match="n_layer"):
        spec.cls(adata, **spec.init, n_layer_=3)


def test_options_show_in_signature_and_documentation(spec):
    parameters = inspect.signature(spec.cls).parameters
    doc = inspect.getdoc(spec.cls)
    for own in fields(spec.cls._options_cls):
        assert parameters[own.name].default == own.default
        assert re.search(rf"^(\w+, )*{own.name}(, \w+)*$", doc, re.M), f"`{own.name}` is not documented"


WRONG_TRAIN: list[tuple[str, Any]] = [
    ("max_epochs", 0),
    ("max_epochs", 1.5),
    ("max_epochs", "many"),
    ("accelerator", "quantum"),
    ("devices", "some"),
    ("devices", 0),
    ("train_size", 0.0),
    ("train_size", 1.5),
    ("train_size", "most"),
    ("validation_size", -0.1),
    ("validation_size", 1.0),
    ("validation_size", "few"),
    ("batch_size", 0),
    ("batch_size", 2.5),
    ("early_stopping", "yes"),
    ("lr", 0),
    ("lr", -1.0),
    ("lr", "fast"),
    ("seed", -1),
    ("seed", 1.5),
    ("datasplitter_kwargs", "split"),
    ("datasplitter_kwargs", {"shuffle": True}),
    ("datasplitter_kwargs", {"external_indexing": "rows"}),
    ("datasplitter_kwargs", {"external_indexing": [[0, 1], [1, 2]]}),
    ("datasplitter_kwargs", {"external_indexing": [[0, 10_000]]}),
    ("datasplitter_kwargs", {"external_indexing": [[], [1, 2]]}),
    ("datasplitter_kwargs", {"external_indexing": [[0.5]]}),
    ("plan_kwargs", "adam"),
    ("plan_kwargs", {"learning_rate": 1}),
]


@pytest.fixture
def trainable():
    return next(spec for spec in SHARED if spec.learns_by_gradient)


@pytest.mark.parametrize(("argument", "value"), WRONG_TRAIN, ids=lambda v: str(v))
def test_train(trainable, screen, unchanged, argument, value):
    adata = screen()
    trainable.setup(adata)
    model = trainable.make(adata)
    before = {k: v.clone() for k, v in model.module.state_dict().items()}
    with unchanged(adata), pytest.raises(Exception, match=f"`?{argument}") as raised:
        model.train(**{"accelerator": "cpu", "enable_progress_bar": False, "max_epochs": 1, argument: value})
    # what Lightning checks it reports itself
    assert isinstance(raised.value, ValueError) or argument in ("accelerator", "devices")
    assert not model.is_trained_
    assert all((v == before[k]).all() for k, v in model.module.state_dict().items())


def test_train_with_contradictions(trainable, screen):
    adata = screen()
    trainable.setup(adata)
    model = trainable.make(adata)
    with pytest.raises(ValueError, match="`train_size` is 0.8, `validation_size` 0.5: .* must be between 0 and 1"):
        model.train(train_size=0.8, validation_size=0.5)
    with pytest.raises(ValueError, match="`early_stopping` needs validation cells"):
        model.train(early_stopping=True, train_size=1.0)
    with pytest.raises(TypeError, match="patience"):
        model.train(patience=3, max_epochs=1)


WRONG_ASKED: list[tuple[str, Any]] = [
    ("perturbation", "absent"),
    ("perturbation", 3),
    ("perturbation", []),
    ("perturbation", ["TF1", 2]),
    ("perturbation", ["TF1", "TF1"]),
    ("perturbation", None),
    ("adata", "file.h5ad"),
    ("indices", [1000]),
    ("indices", [-1]),
    ("indices", []),
    ("indices", [1, 1]),
    ("indices", [0.5]),
    ("indices", "all"),
    ("indices", [True, False]),
    ("dose", -1),
    ("dose", float("nan")),
    ("dose", "high"),
    ("dose", 1.0),
    ("n_samples", 0),
    ("n_samples", 2.5),
    ("n_samples", True),
    ("n_samples", 1),
    ("ci", 0),
    ("ci", 1.0),
    ("ci", 90),
    ("ci", "wide"),
    ("noise", "loud"),
    ("scale", "log2"),
    ("batch_size", 0),
    ("batch_size", "big"),
    ("seed", -1),
    ("seed", 0.5),
]
ONLY_PREDICT: list[tuple[str, Any]] = [
    ("key_added", ""),
    ("key_added", 3),
    ("key_added", "a/b"),
    ("by", "donor"),
    ("by", None),
    ("return_anndata", "yes"),
    ("overwrite", 1),
    ("out", "predictions.csv"),
]
METHODS = {
    "predict_perturbation": [*WRONG_ASKED, *ONLY_PREDICT],
    # without a perturbation, the effects of all are asked
    "get_perturbation_effect": [
        *(w for w in WRONG_ASKED if w != ("perturbation", None)),
        ("ci", None),
        ("delta", -0.1),
        ("delta", "small"),
    ],
    "iter_predictions": [*WRONG_ASKED, ("chunk_size", 0), ("chunk_size", 1.5)],
    "get_latent_representation": [
        *(w for w in WRONG_ASKED if w[0] in ("adata", "indices", "n_samples", "batch_size", "seed") and w[1] != 1),
        ("kind", "latent"),
        ("kind", None),
    ],
    "posterior_predictive_sample": [
        w for w in WRONG_ASKED if w[0] in ("adata", "indices", "n_samples", "batch_size", "seed") and w[1] != 1
    ],
}
ASKED = [(method, argument, value) for method, wrong in METHODS.items() for argument, value in wrong]


@pytest.mark.parametrize(("method", "argument", "value"), ASKED, ids=lambda v: str(v))
def test_prediction(shared_spec, trained_shared, screen, unchanged, method, argument, value):
    adata = screen()
    right = {"adata": adata, **N}
    if "perturbation" in inspect.signature(getattr(trained_shared, method)).parameters:
        right["perturbation"] = trained_shared.vocabulary.names[0]
    with unchanged(adata), unchanged(trained_shared.adata), pytest.raises(ValueError, match=f"`{argument}"):
        getattr(trained_shared, method)(**{**right, argument: value})


@pytest.mark.parametrize("method", METHODS)
def test_every_argument_is_tried(trained_shared, method):
    parameters = set(inspect.signature(getattr(PerturbationModel, method)).parameters) - {"self", "changes"}
    assert parameters == {argument for argument, _ in METHODS[method]}


def test_every_argument_of_train_is_tried(spec):
    assert {a for a, _ in WRONG_TRAIN} >= set(inspect.signature(spec.cls.train).parameters) - {"self", "trainer_kwargs"}


def test_asked_before_training(spec, screen):
    adata = screen()
    spec.setup(adata)
    model = spec.make(adata)
    with pytest.raises(RuntimeError, match="not trained"):
        model.predict_perturbation(model.vocabulary.names[0])
