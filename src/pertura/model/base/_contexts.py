"""What models that predict mean effects learn from a query: control profiles of contexts, and whether they know all cells."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pertura.data._vocabulary import Vocabulary
from pertura.effects._sums import control_means

from ._query import Query

logger = logging.getLogger(__name__)


def control_profiles(control: Tensor, has_control: Tensor, asked: Query) -> Tensor | None:
    """Profiles of all contexts of a query: its controls stand in where training had none of a context.

    Parameters
    ----------
    control
        Profiles of the training contexts, ``(n_contexts, n_genes)``.
    has_control
        Whether training had controls of them, ``(n_contexts,)``.
    asked
        Cells; all controls of their AnnData count, not only those that are asked.

    Returns
    -------
    ``(n, n_genes)``, n the number of contexts of the query; `None` where the query adds nothing. A context without any
    control is taken for an average one.
    """
    known = np.flatnonzero(has_control.cpu().numpy())
    everywhere = asked.at(np.arange(asked.manager.adata.n_obs)).context
    new = np.setdiff1d(everywhere, known)
    if not len(new):
        return None
    extra = control[known].mean(0).expand(max(0, len(asked.contexts) - len(control)), -1)
    control = torch.cat([control, extra])
    found, mean = control_means(asked.manager, new)
    if not found.all():
        missing = ", ".join(repr(asked.contexts[c]) for c in new[~found])
        logger.warning("No control cells in %s: taken for an average context.", missing)
    control[new[found]] = torch.as_tensor(mean[found], device=control.device)
    return control


def check_combinations(
    asked: Query, vocabulary: Vocabulary, representable: Callable[[NDArray[np.int64]], bool]
) -> None:
    """Raise where cells carry a perturbation whose effect can not be taken off: members may be known that are none together.

    Parameters
    ----------
    asked
        Cells.
    vocabulary
        Names of the codes.
    representable
        Whether the effect of members with these codes can be predicted.
    """
    codes, _ = asked.actions
    kinds, number = np.unique(codes[(codes >= 0).any(1)], axis=0, return_counts=True)
    for members, n_cells in zip(kinds, number, strict=True):
        members = members[members >= 0]
        if not representable(members):
            label = vocabulary.delimiter.join(vocabulary.names[c] for c in members)
            raise ValueError(
                f"`adata`: {n_cells} cells carry the perturbation {label!r}, which was not among the training cells; their "
                "basal state can not be inferred. Pass control cells with `indices`."
            )
