"""How much of several predictions is believed, by what they said of contexts that they were not fitted to."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.optimize import nnls
from scipy.stats import ttest_1samp

# share of the variation between contexts that is more than chance; Higgins et al. 2003, BMJ 327:557-560
_LOW_HETEROGENEITY = 0.25
_CHANCE = 0.1  # p value of a gain in left-out contexts, above which it is none


def stack_shares(
    target: NDArray[np.float64], predicted: Sequence[NDArray[np.float64]], context: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Shares of predictions that explain measured deviations best: not negative, and at most 1 together.

    They are 0 where a t test over the contexts does not find a gain: the contexts are what is new, and the perturbations of one go
    up and down together.

    Parameters
    ----------
    target
        Measured effects of left-out conditions less the mean effect, ``(n, n_coordinates)``.
    predicted
        The same as each predictor says, fitted without the context.
    context
        Context of each row, ``(n,)``.
    """
    inputs = np.stack([np.ravel(part) for part in predicted], axis=1)
    share, _ = nnls(inputs, target.ravel())
    share = share / max(1.0, share.sum())
    left = target - (inputs @ share).reshape(target.shape)
    gain = pd.Series((target**2 - left**2).sum(1)).groupby(context).mean()
    if len(gain) < 2 or not ttest_1samp(gain, 0.0, alternative="greater").pvalue < _CHANCE:
        share[:] = 0.0  # no more than chance would give: the mean effect
    return share


def share_of_differences(
    target: NDArray[np.float64], predicted: NDArray[np.float64], noise: NDArray[np.float64]
) -> float:
    """Share of a prediction of how contexts differ, between 0 and 1, with the least error in left-out contexts.

    0 where contexts differ by hardly more than chance (:math:`I^2` below 25 %): what then predicts differences predicts noise.

    Parameters
    ----------
    target
        Measured effects of left-out conditions less what is predicted for all contexts, ``(n, n_coordinates)``.
    predicted
        What is predicted to differ in their context, with noise of its own.
    noise
        Sampling variance of a target, summed over coordinates, ``(n,)``; conditions count by its inverse.
    """
    weight = 1.0 / np.maximum(noise, 1e-12)
    energy, chance = float(weight @ (target**2).sum(1)), float(weight @ noise)
    if energy - chance <= _LOW_HETEROGENEITY * energy:
        return 0.0
    size = float(weight @ (predicted**2).sum(1))
    return float(np.clip(weight @ (target * predicted).sum(1) / max(size, 1e-12), 0.0, 1.0))
