"""The study that takes parts out of models."""

from __future__ import annotations

from pkgutil import resolve_name

import numpy as np

from pertura.benchmark import parse_model


def test_a_part_that_matters_is_told_from_one_that_does_not(capsys, tmp_path):
    from ablations import Part, main, share, study

    never = ("pertura.baseline._empirical_bayes.stack_shares", lambda *_: np.zeros(2))
    data = ("converging", "alike")
    parts = [
        Part("convergence", "EmpiricalBayes", data, share(0)),
        Part("the same, when it is fitted", "EmpiricalBayes", data, patched=never),
        Part("the same, as an option", "MeanEffect:converge=True", data, without="MeanEffect"),
        Part("nothing", "EmpiricalBayes", data),
    ]
    table = study(parts, seeds=1, folds=1).set_index(["data", "part"])["less error, %"]
    assert (table["converging"].iloc[:3] > 80).all() and table["converging", "nothing"] == 0
    assert (table["alike"].abs() < 5).all()
    assert np.isclose(*table["converging"].iloc[:2])

    main(["--models", "MeanEffect", "--data", "converging", "--folds", "1", "--out", str(tmp_path / "found.csv")])
    assert "converging" in capsys.readouterr().out and (tmp_path / "found.csv").is_file()


def test_parts_can_be_taken_out_of_trained_models():
    """Of models of the simulated screen: each switch changes what it should, and only in the copy."""
    from ablations import PARTS, Fits, no_transfer, task

    for part in PARTS:
        parse_model(part.model), parse_model(part.without or part.model)
        if part.patched is not None:
            resolve_name(part.patched[0])
    data, (split,) = task("planted, missing")
    part = next(p for p in PARTS if p.off is no_transfer)
    text, fits = "PerturbX:n_members=1,train.max_epochs=1", Fits()
    adata, names, answers = data.rows(split.train), sorted(set(data.labels[split.test]))[:5], []
    for taken in (None, part, None):
        model = fits.factory(taken, text)(adata, setup=data.keys, seed=0)
        answers.append(model.get_perturbation_effect(names, n_samples=2)["lfc_mean"].to_numpy())
    np.testing.assert_array_equal(answers[0], answers[2])
    assert np.abs(answers[0] - answers[1]).max() > 0.1
