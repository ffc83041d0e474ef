"""What PerturbX says about genes, contexts and cells."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from pertura.effects import Asked

from .base import PerturbationModel
from .base._arguments import check_whole, resolve_perturbations
from .base._query import Query

logger = logging.getLogger(__name__)
Matrix = NDArray[np.float64]


def ask(model: PerturbationModel, perturbation: str | None) -> Asked:
    """One perturbation at its usual dose."""
    one = resolve_perturbations(model, perturbation, None)[0]
    codes = model.vocabulary.code(model.vocabulary.parse(one.label))[: len(one.dose)]
    return model.module.conditions.ask(codes, np.asarray(one.dose, dtype=np.float64))


def selected_genes(model: PerturbationModel) -> pd.DataFrame:
    """See :meth:`PerturbX.get_selected_genes`."""
    chosen = model.module.chosen_genes().cpu().numpy()
    probability = model.module.selector.logits.detach().softmax(-1).amax(-1).cpu().numpy()
    member = np.broadcast_to(np.arange(len(chosen))[:, None], chosen.shape)
    table = pd.DataFrame(
        {"gene": model.gene_names[chosen.ravel()], "member": member.ravel(), "probability": probability.ravel()}
    )
    grouped = table.groupby("gene")
    result = pd.DataFrame(
        {
            "stability": grouped["member"].nunique() / len(chosen),
            "n_rows": grouped.size(),
            "probability": grouped["probability"].mean(),
        }
    )
    return result.sort_values(["stability", "n_rows"], ascending=False, kind="stable")


# -- representations of contexts ----------------------------------------------------------------------------------------


def representation(model: PerturbationModel, asked: Asked, cells: Query | None = None) -> tuple[list[str], Matrix]:
    """Names of contexts, and what the members make of their bags, ``(n, n_members * n_latent)``.

    Parameters
    ----------
    model
        Trained.
    asked
        Perturbation.
    cells
        Cells whose contexts are wanted; by default those of training.
    """
    module = model.module
    if cells is None:
        names, bag, kept = model.contexts, module.bag, module.has_bag.cpu().numpy()
    else:
        learned = model._learn_from_query(cells)
        names, bag = cells.contexts, learned["bag"]
        kept = learned["has_bag"].cpu().numpy() & np.isin(np.arange(len(bag)), cells.context)
    at = np.flatnonzero(kept)
    z = module.predict_bags(module.action_of([asked] * len(at)), bag[torch.as_tensor(at, device=bag.device)])[1]
    return [names[i] for i in at], z.flatten(1).double().cpu().numpy()


def representation_axes(model: PerturbationModel, asked: Asked) -> tuple[Matrix, Matrix]:
    """Center and principal axes of the training contexts' representations."""
    _, z = representation(model, asked)
    center = z.mean(0)
    _, _, axes = np.linalg.svd(z - center, full_matrices=False)
    n = max(1, min(len(z) - 1, model.module.n_latent))
    # the sign of an axis is free: the context furthest from the center is positive
    score = (z - center) @ axes[:n].T
    sign = np.sign(score[np.abs(score).argmax(0), np.arange(n)])
    return center, axes[:n] * np.where(sign == 0, 1.0, sign)[:, None]


def attention(model: PerturbationModel, asked: Asked, cells: Query) -> pd.Series:
    """See :meth:`PerturbX.get_attention`."""
    module, device = model.module, model.module.input_mean.device
    result = np.full(len(cells), np.nan)
    e = module.indicator(module.action_of([asked]))
    controls = np.flatnonzero(cells.is_control)
    for code in np.unique(cells.context[controls]):
        own = controls[cells.context[controls] == code]
        with torch.no_grad():
            z = [module.encode(module.describe(part)[None], e) for part in cells.at(cells.rows[own]).cells(512, device)]
            weight = module.aggregation.weights(torch.cat(z, 1))[0, ..., 0].mean(-1)
        result[own] = weight.cpu().numpy() * len(own)
    return pd.Series(result, index=cells.user.obs_names, name="attention")


# -- importance of genes ------------------------------------------------------------------------------------------------


def gene_importance(
    model: PerturbationModel, perturbation: str | None, of: str, component: int, n_cells: int, n_samples: int, seed: int
) -> pd.DataFrame:
    """See :meth:`PerturbX.get_gene_importance`."""
    check_whole("n_cells", n_cells)
    check_whole("n_samples", n_samples)
    if of not in ("representation", "prediction"):
        raise ValueError(f"`of` must be 'representation' or 'prediction', got {of!r}.")
    selected = model.get_selected_genes()
    asked = ask(model, perturbation)
    if of == "prediction":
        axis = _component(component, effect_axes(model, asked))
        value, x = _prediction_values(model, asked, axis, n_cells, n_samples, seed)
        genes = np.arange(len(model.gene_names))
    else:
        axis = _component(component, representation_axes(model, asked)[1])
        value, x, genes = _representation_values(model, asked, axis, n_cells, n_samples, seed)
        if not model.shares["networks"] > 0:
            logger.warning(
                "The neural networks have no share in the prediction: their representation is not what it is made of. "
                "Ask for `of='prediction'`."
            )
    centered = (x - x.mean(0)) * (value - value.mean(0))
    scale = x.std(0) * value.std(0)
    table = pd.DataFrame(
        {
            "importance": np.abs(value).mean(0),
            "direction": np.divide(centered.mean(0), scale, out=np.zeros(len(genes)), where=scale > 1e-12),
        },
        index=pd.Index(model.gene_names[genes], name="gene"),
    )
    table["stability"] = selected["stability"].reindex(table.index).fillna(0.0)
    return table.sort_values("importance", ascending=False, kind="stable")


def effect_axes(model: PerturbationModel, asked: Asked) -> Matrix:
    """Principal axes, in genes, of how the measured effects of training contexts differ."""
    effect = model.module.measured_effects(asked)
    if len(effect) < 2:
        raise ValueError(
            f"`perturbation`: it was measured in {len(effect)} training contexts; which genes predict how its effect "
            "differs between contexts needs 2 or more."
        )
    _, _, axes = np.linalg.svd(effect - effect.mean(0), full_matrices=False)
    sign = np.sign(axes @ effect.mean(0))
    return axes[: len(effect) - 1] * np.where(sign == 0, 1.0, sign)[: len(effect) - 1, None]


def _representation_values(
    model: PerturbationModel, asked: Asked, axis: Matrix, n_cells: int, n_samples: int, seed: int
) -> tuple[Matrix, Matrix, NDArray[np.int64]]:
    """Shapley values and expression of selected genes in single cells."""
    module = model.module
    e = module.indicator(module.action_of([asked]))
    along = torch.as_tensor(axis, dtype=torch.float32, device=e.device)
    bag = module.bag[module.has_bag].flatten(0, 1)
    rows = torch.as_tensor(np.random.default_rng(seed).permutation(len(bag))[:n_cells], device=bag.device)

    def coordinate(u: Tensor) -> Tensor:
        return module.encode(u[:, None], e.expand(len(u), -1)).flatten(1) @ along

    return _shapley(coordinate, module.chosen_genes(), bag[rows], n_samples, seed)


def _prediction_values(
    model: PerturbationModel, asked: Asked, axis: Matrix, n_cells: int, n_samples: int, seed: int
) -> tuple[Matrix, Matrix]:
    """Shapley values and expression of all genes in the mean control cells of contexts."""
    module, (regression, bags, convergence) = model.module, model.shares
    kept = np.flatnonzero(module.has_bag.cpu().numpy())
    x = module.means.control.cpu().double().numpy()[kept]
    value = (regression * module.regression_slope(asked, axis) - convergence * axis) * (x - x.mean(0))
    if bags > 0:
        action = module.action_of([asked])
        along = torch.as_tensor(axis, dtype=torch.float32, device=module.bag.device)
        number, rng = max(1, n_cells // len(kept)), np.random.default_rng(seed)
        drawn = [torch.as_tensor(rng.permutation(module.n_stored)[:number]) for _ in kept]
        cells = torch.cat([module.bag[c][rows.to(module.bag.device)] for c, rows in zip(kept, drawn, strict=True)])

        def coordinate(u: Tensor) -> Tensor:
            return bags * (module.predict_bags(action.expand(len(u)), u[:, None])[0].mean(1) @ along)

        own, _, genes = _shapley(coordinate, module.chosen_genes(), cells, n_samples, seed)
        value[:, genes] += own.reshape(len(kept), -1, len(genes)).mean(1)
    return value, x


def _component(component: int, axes: Matrix) -> Matrix:
    whole = isinstance(component, (int, np.integer)) and not isinstance(component, bool)
    if not whole or not 0 <= component < len(axes):
        raise ValueError(f"`component` must be between 0 and {len(axes) - 1}, got {component!r}.")
    return axes[component]


def _shapley(
    function: Callable[[Tensor], Tensor], chosen: Tensor, bag: Tensor, n_samples: int, seed: int
) -> tuple[Matrix, Matrix, NDArray[np.int64]]:
    """Shapley values of a function of the chosen genes of cells.

    Parameters
    ----------
    function
        Of ``(n, n_members, n_selected)``.
    chosen
        Gene of each row of the selectors, ``(n_members, n_selected)``.
    bag
        Cells to explain, ``(n_cells, n_members, n_selected)``; background is 0, the mean of standardized genes.
    n_samples, seed
        Permutations of the genes, and their seed.

    Returns
    -------
    Values and expression, ``(n_cells, n)``, and the n genes: a gene that several members chose is one feature.
    """
    from captum.attr import ShapleyValueSampling

    genes, place = np.unique(chosen.cpu().numpy(), return_inverse=True)
    place = torch.as_tensor(place.reshape(chosen.shape), device=bag.device)
    # from the members' own choices back to one value per gene
    x = torch.zeros(len(bag), len(genes), device=bag.device)
    x.scatter_(1, place.flatten().expand(len(bag), -1), bag.flatten(1))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        explainer = ShapleyValueSampling(lambda values: function(values[:, place]))
        value = explainer.attribute(x, baselines=torch.zeros_like(x), n_samples=n_samples)
    return value.double().cpu().numpy(), x.double().cpu().numpy(), genes
