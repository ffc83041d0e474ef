"""How much of several predictions is believed, by what they said of contexts that they were not fitted to."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.optimize import nnls
from scipy.stats import ttest_1samp

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
