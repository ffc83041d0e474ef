"""Which genes a drug may hit: scores from interactions of proteins, from vectors of drugs, from the targets of similar drugs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from pertura.data._perturbation import Perturbation, encode
from pertura.module._base import Action

from .base import PerturbationModel
from .base._predict import device_of

_SHARPNESS = 10.0  # of a neighbor's weight, exp of this times its similarity
_KNOCKED = -5.0


@torch.no_grad()
def by_interactions(
    model: PerturbationModel, perturbations: Sequence[Perturbation], damping: float, n_steps: int
) -> NDArray[np.float32]:
    """Absolute effect on a gene and its neighbors, in units of what all drugs do there, ``(n_perturbations, n_genes)``."""
    module = model.module
    genes, closed = module.genes, module.closed_form
    effect = torch.stack([_effect(model, p) for p in perturbations]).abs()
    every = closed.effects[closed.measured].mean(1) @ closed.basis.mT
    unit = every.abs().mean(0) if len(every) and closed.n_components else effect.mean(0)
    total = step = (effect / (unit + 0.1 * unit.mean() + 1e-9)).mT
    spread = degree = torch.ones(len(step), device=step.device)
    if len(genes.weights):
        for i in range(1, n_steps + 1):
            step, degree = genes.propagate(step), genes.propagate(degree[:, None])[:, 0]
            total, spread = total + damping**i * step, spread + damping**i * degree
    # a gene with many neighbors collects much of everything: in units of what it would collect of a constant
    return (total / spread[:, None]).mT.cpu().numpy().astype(np.float32)


def _effect(model: PerturbationModel, perturbation: Perturbation) -> Tensor:
    """Effect on the activations of an average cell, mean over contexts, ``(n_genes,)``."""
    module = model.module
    device, embedding = device_of(module), module.genes()
    parts = (
        None if part is None else torch.as_tensor(part)[None].to(device)
        for part in encode(model.vocabulary, perturbation)
    )
    contexts = torch.arange(module.n_contexts, device=device)
    shift, effect = module.describe(Action(*parts).expand(len(contexts)), contexts, embedding)
    batch = torch.zeros_like(contexts)
    moved = module.decode(shift, batch, embedding) - module.decode(torch.zeros_like(shift), batch, embedding)
    if module.native_scale != "counts":
        moved = moved * module.likelihood.unit
    return (moved + module.on_genes(effect)).mean(0)


@torch.no_grad()
def by_signature(model: PerturbationModel, labels: Sequence[str]) -> NDArray[np.float32]:
    """Similarity of drugs' vectors to those of signatures in which one gene alone is changed."""
    module = model.module
    vectors = model.get_drug_embedding().loc[list(labels)].drop(columns="trained")
    v = torch.as_tensor(vectors.to_numpy(np.float32)).to(device_of(module))
    knocked = module.drugs.read_signature(_KNOCKED * torch.eye(module.n_genes, device=v.device), module.genes())
    return (F.normalize(v, dim=-1) @ F.normalize(knocked, dim=-1).mT).abs().cpu().numpy()


def by_neighbors(
    names: Sequence[str], unit: NDArray, labels: Sequence[str], known: pd.DataFrame, genes: pd.Index
) -> NDArray[np.float32]:
    """How often genes are targets of other drugs, those with similar descriptions counting more.

    Parameters
    ----------
    names, unit
        Drugs with descriptions, and the descriptions at length 1.
    labels
        Drugs that are asked.
    known
        Targets of some drugs, drugs x genes.
    genes
        Genes of the model.
    """
    lookup = {name: i for i, name in enumerate(names)}
    rows = [n for n in known.index.astype(str) if n in lookup]
    absent = [n for n in labels if n not in lookup]
    if not rows or absent:
        what = f"no drug of `known_targets` (first: {list(known.index[:3])})" if not rows else f"not {absent[:3]}"
        raise ValueError(f"`method='neighbors'` compares descriptions of single drugs; the model has {what}.")
    target = known.set_axis(known.index.astype(str)).reindex(columns=genes).fillna(0).loc[rows]
    similarity = unit[[lookup[n] for n in labels]] @ unit[[lookup[n] for n in rows]].T
    weight = np.exp(_SHARPNESS * similarity) * (np.array(labels)[:, None] != np.array(rows))
    score = weight @ target.to_numpy(np.float64) / np.maximum(weight.sum(1, keepdims=True), 1e-12)
    return score.astype(np.float32)
