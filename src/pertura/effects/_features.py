"""Features of measured and of asked perturbations."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pertura.data._constants import UNKNOWN

from ._contexts import Asked


def member_features(asked: Asked, known: NDArray) -> NDArray | None:
    """Features of the members, ``(n_members, n_features)``; `None` where one has none.

    Parameters
    ----------
    asked
        Perturbation.
    known
        Features of the vocabulary's perturbations, ``(n_perturbations, n_features)``.
    """
    if not known.shape[1]:
        return None
    features = known[np.maximum(asked.codes, 0)]
    if asked.features is not None:
        features = np.where((asked.codes == UNKNOWN)[:, None], asked.features, features)
    elif (asked.codes == UNKNOWN).any():
        return None
    return features if features.any(axis=1).all() else None


def label_features(
    codes: NDArray[np.int64], known: NDArray, amount: NDArray | float = 1.0
) -> tuple[NDArray, NDArray[np.bool_]]:
    """Sums of the members' features, each times its amount, for rows of codes, and whether all members have some."""
    present = codes >= 0
    features = known[np.maximum(codes, 0)]
    described = known.any(axis=1)[np.maximum(codes, 0)] & bool(known.shape[1])
    return np.einsum("nm,nmf->nf", amount * present, features), (described | ~present).all(1)


def cosine(vectors: NDArray, one: NDArray) -> NDArray:
    """Cosine of each row with a vector; 0 where one of them is 0."""
    norm = np.linalg.norm(vectors, axis=1) * np.linalg.norm(one)
    return vectors @ one / np.maximum(norm, 1e-12)


def linear_slope(
    features: NDArray, described: NDArray[np.bool_], context: NDArray[np.int64], ridge: float
) -> NDArray[np.float64]:
    r"""P (P^T P + ridge)^-1 of each context, ``(n_conditions, n_features)``; 0 for conditions without features.

    Parameters
    ----------
    features
        P of each condition, ``(n_conditions, n_features)``.
    described
        Whether a condition has features, ``(n_conditions,)``.
    context
        Its context, ``(n_conditions,)``.
    ridge
        Penalty.
    """
    slope = np.zeros_like(features)
    for code in np.unique(context[described]):
        own = np.flatnonzero(described & (context == code))
        x = features[own]
        if len(own) < x.shape[1]:
            slope[own] = np.linalg.solve(x @ x.T + ridge * np.eye(len(own)), x)
        else:
            slope[own] = np.linalg.solve(x.T @ x + ridge * np.eye(x.shape[1]), x.T).T
    return slope
