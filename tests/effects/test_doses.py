"""Weights of measured doses: logarithmic between them, in proportion to the dose below, constant above, in any unit."""

import numpy as np
import pytest

from pertura.effects import Conditions

CODES = np.array([[0, -1]] * 3 + [[1, -1]] + [[0, 1]] * 2)
DOSE = np.array([[0.1, 0], [1, 0], [100, 0], [2, 0], [1, 4], [4, 1]], dtype=float)


def weights(code, dose, unit=1.0):
    found = Conditions(CODES, DOSE * unit, np.zeros(6, np.int64), 1)
    dose = np.atleast_1d(np.asarray(dose, dtype=float)) * unit
    return found.ask(np.atleast_1d(code), dose).at_dose


@pytest.mark.parametrize(
    ("dose", "expected"),
    [
        (0.1, [1, 0, 0]),
        (0.1 * 10**0.5, [0.5, 0.5, 0]),
        (10.0, [0, 0.5, 0.5]),
        (0.01, [0.1, 0, 0]),
        (1e4, [0, 0, 1]),
    ],
)
@pytest.mark.parametrize("unit", [1.0, 1e-9, 1e9, 3.7])
def test_interpolation(dose, expected, unit):
    np.testing.assert_allclose(weights(0, dose, unit)[:3], expected, atol=1e-9)
    other = weights(0, dose, unit)[3]
    assert other == pytest.approx(min(1.0, dose / 2))


def test_no_dose_has_no_effect_and_close_doses_are_one():
    assert weights(0, 1e-12)[:3].sum() < 1e-10
    np.testing.assert_allclose(weights(0, 1.0000001), weights(0, 1.0), atol=1e-6)


@pytest.mark.parametrize("unit", [1.0, 1e-9, 1e9, 3.7])
def test_combinations_at_the_very_doses_first(unit):
    codes = np.array([0, 1])
    np.testing.assert_allclose(weights(codes, [1.0, 4.00001], unit)[4:], [1, 0])
    # equal mean of the logarithms: both
    np.testing.assert_allclose(weights(codes, [2.0, 2.0], unit)[4:], [0.5, 0.5], atol=1e-9)
    np.testing.assert_allclose(weights(codes, [1.0, 1.0], unit)[4:], [0.25, 0.25], atol=1e-9)
