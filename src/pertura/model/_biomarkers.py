"""What PerturbX says about genes, contexts and cells."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from numpy.typing import NDArray

from pertura.module._base import Action

from ._arguments import check_whole
from ._engine import encode

if TYPE_CHECKING:
    from pertura.module._perturbx import PerturbX as Module

logger = logging.getLogger(__name__)


class BiomarkerMixin:
    """Selected genes, representations of contexts, importance of genes and weights of cells."""

    module: Module
    gene_names: Any
    contexts: list[str]

    @property
    def shares(self) -> pd.Series:
        """Shares of the regression and of the networks in what a prediction for a new context adds to the mean effect.

        As training contexts that they did not see bore them out; two zeros: a prediction is the mean effect.
        """
        self._check_if_trained(warn=False, message="The model is not trained. Call `train()` first.")
        share = self.module.share.tolist() if self.module.residual else (0.0, 1.0)
        return pd.Series(share[:2], index=["regression", "networks"], name="share")

    def get_selected_genes(self) -> pd.DataFrame:
        """Genes that the selectors of the ensemble picked.

        Returns
        -------
        DataFrame indexed by gene, most stable first: ``stability``, the share of members that picked it, ``n_rows``, how
        many rows of all selectors did, and ``probability``, their mean probability.
        """
        self._check_if_trained(warn=False, message="The model is not trained. Call `train()` first.")
        selector = self.module.selector
        chosen = self.module.chosen_genes().cpu().numpy()
        probability = selector.logits.detach().softmax(-1).amax(-1).cpu().numpy()
        member = np.broadcast_to(np.arange(len(chosen))[:, None], chosen.shape)
        table = pd.DataFrame(
            {"gene": self.gene_names[chosen.ravel()], "member": member.ravel(), "probability": probability.ravel()}
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

    def get_context_representation(
        self, perturbation: str | None = None, *, adata: AnnData | None = None
    ) -> pd.DataFrame:
        """What the networks see in the control cells of each context.

        Parameters
        ----------
        perturbation
            The representation depends on it; `None`: the only one there is.
        adata
            Cells with controls of the contexts; by default the training contexts.

        Returns
        -------
        DataFrame, contexts x ``PC1, PC2, ...``: principal components of the members' representations (``uns`` of no
        AnnData is touched). Axes are those of the training contexts, so that contexts of a query can be placed among them.
        """
        names, z, _ = self._representation(perturbation, adata)
        centre, axes = self._axes(perturbation)
        scores = (z - centre) @ axes.T
        return pd.DataFrame(scores, index=names, columns=[f"PC{i + 1}" for i in range(scores.shape[1])])

    def _question_action(self, perturbation: str | None, n: int) -> Action:
        question = self._questions(perturbation, None)[0]
        action = encode(self.vocabulary, question)
        return Action(action.codes.expand(n, -1), action.dose.expand(n, -1))

    def _representation(
        self, perturbation: str | None, adata: AnnData | None
    ) -> tuple[list[str], NDArray[np.float64], torch.Tensor]:
        self._check_if_trained(warn=False, message="The model is not trained. Call `train()` first.")
        if adata is None:
            names, bag, has_bag = self.contexts, self.module.bag, self.module.has_bag
        else:
            manager, _ = self._query(adata, None)
            names = self._context_names(manager)
            globals_ = self._globals(manager, 1, 0)
            present = np.unique(self._contexts_of(manager, np.arange(manager.adata.n_obs)))
            bag, has_bag = globals_["bag"], globals_["has_bag"].clone()
            has_bag[np.setdiff1d(np.arange(len(names)), present)] = False
        kept = np.flatnonzero(has_bag.cpu().numpy())
        z = self.module.network(self._question_action(perturbation, len(kept)), bag[kept])[1]
        return [names[i] for i in kept], z.flatten(1).double().cpu().numpy(), bag[kept]

    def _axes(self, perturbation: str | None) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Centre and principal axes of the training contexts' representations."""
        _, z, _ = self._representation(perturbation, None)
        centre = z.mean(0)
        _, _, axes = np.linalg.svd(z - centre, full_matrices=False)
        n = max(1, min(len(z) - 1, self.module.n_latent))
        # the sign of an axis is free: the context furthest from the centre is positive
        score = (z - centre) @ axes[:n].T
        sign = np.sign(score[np.abs(score).argmax(0), np.arange(n)])
        return centre, axes[:n] * np.where(sign == 0, 1.0, sign)[:, None]

    def get_gene_importance(
        self,
        perturbation: str | None = None,
        *,
        of: Literal["representation", "prediction"] = "representation",
        component: int = 0,
        n_cells: int = 64,
        n_samples: int = 10,
        seed: int = 0,
    ) -> pd.DataFrame:
        """Shapley values of genes in control cells: what foretells a response.

        Parameters
        ----------
        perturbation
            Perturbation; `None`: the only one there is.
        of
            ``"representation"``, as in the paper: the function explained is a control cell's coordinate on a component of
            :meth:`get_context_representation`, and the genes are those the selectors picked. ``"prediction"``: it is the
            coordinate of the predicted effect in a new context, in which regression and networks have their shares, on a
            component of how the measured effects differ between training contexts; positive is along the mean effect, and
            all genes are explained.
        component
            Component, from 0. The first separates responders from others where there are both.
        n_cells
            Control cells, of all contexts, to explain.
        n_samples
            Permutations of the genes (:class:`captum.attr.ShapleyValueSampling`). The regression is linear, its values are
            exact.
        seed
            Of cells and permutations.

        Returns
        -------
        DataFrame indexed by gene: ``importance``, the mean absolute Shapley value of cells (of contexts for
        ``of="prediction"``), with the mean control cell as background; ``direction``, the correlation of expression with the
        Shapley value: positive where more expression raises the coordinate; ``stability`` of the selection, 0 for genes that
        no network picked.
        """
        check_whole("n_cells", n_cells)
        check_whole("n_samples", n_samples)
        if of not in ("representation", "prediction"):
            raise ValueError(f"`of` must be 'representation' or 'prediction', got {of!r}.")
        selected = self.get_selected_genes()
        if of == "prediction":
            axis = _component(component, self._effect_axes(perturbation))
            value, x = self._prediction_values(perturbation, axis, n_cells, n_samples, seed)
            genes = np.arange(len(self.gene_names))
        else:
            axis = _component(component, self._axes(perturbation)[1])
            value, x, genes = self._representation_values(perturbation, axis, n_cells, n_samples, seed)
            if not self.shares["networks"] > 0:
                logger.warning(
                    "The networks have no share in the prediction: their representation is not what it is made of. "
                    "Ask for `of='prediction'`."
                )
        centred = (x - x.mean(0)) * (value - value.mean(0))
        scale = x.std(0) * value.std(0)
        table = pd.DataFrame(
            {
                "importance": np.abs(value).mean(0),
                "direction": np.divide(centred.mean(0), scale, out=np.zeros(len(genes)), where=scale > 1e-12),
            },
            index=pd.Index(self.gene_names[genes], name="gene"),
        )
        table["stability"] = selected["stability"].reindex(table.index).fillna(0.0)
        return table.sort_values("importance", ascending=False, kind="stable")

    def _representation_values(
        self, perturbation: str | None, axis: NDArray[np.float64], n_cells: int, n_samples: int, seed: int
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
        """Shapley values and expression of selected genes in single cells."""
        module, action = self.module, self._question_action(perturbation, 1)
        along = torch.as_tensor(axis, dtype=torch.float32)
        bag = module.bag[module.has_bag].flatten(0, 1).cpu()
        rows = np.random.default_rng(seed).permutation(len(bag))[:n_cells]

        def coordinate(u: torch.Tensor) -> torch.Tensor:
            e = module.indicator(action).expand(len(u), -1)
            return module.encode(u[:, None], e).flatten(1) @ along

        return _shapley(coordinate, module.chosen_genes().cpu(), bag[torch.as_tensor(rows)], n_samples, seed)

    def _prediction_values(
        self, perturbation: str | None, axis: NDArray[np.float64], n_cells: int, n_samples: int, seed: int
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Shapley values and expression of all genes in the mean control cells of contexts."""
        module, action = self.module, self._question_action(perturbation, 1)
        along = torch.as_tensor(axis, dtype=torch.float32)
        regression, network = self.shares
        kept = torch.nonzero(module.has_bag.cpu()).ravel()
        x = module.control.cpu().double().numpy()[kept]
        value = regression * module.regression_slope(action, axis) * (x - x.mean(0))
        if network > 0:
            number = max(1, n_cells // len(kept))
            rng = np.random.default_rng(seed)
            cells = torch.stack([module.bag[c].cpu()[rng.permutation(module.n_stored)[:number]] for c in kept])

            def coordinate(u: torch.Tensor) -> torch.Tensor:
                own = Action(action.codes.expand(len(u), -1), action.dose.expand(len(u), -1))
                return network * (module.network(own, u[:, None])[0].mean(1) @ along)

            own, _, genes = _shapley(coordinate, module.chosen_genes().cpu(), cells.flatten(0, 1), n_samples, seed)
            value[:, genes] += own.reshape(len(kept), number, -1).mean(1)
        return value, x

    def _effect_axes(self, perturbation: str | None) -> NDArray[np.float64]:
        """Principal axes, in genes, of how the measured effects of training contexts differ."""
        effect = self.module.measured_effects(self._question_action(perturbation, 1)).numpy()
        if len(effect) < 2:
            raise ValueError(
                f"`perturbation`: it was measured in {len(effect)} training contexts; what foretells how its effect "
                "differs between contexts needs 2 or more."
            )
        _, _, axes = np.linalg.svd(effect - effect.mean(0), full_matrices=False)
        sign = np.sign(axes @ effect.mean(0))
        return axes[: len(effect) - 1] * np.where(sign == 0, 1.0, sign)[: len(effect) - 1, None]

    def get_attention(self, perturbation: str | None = None, *, adata: AnnData | None = None) -> pd.Series:
        """Weight of each control cell in the representation of its context, times the number of its control cells.

        Parameters
        ----------
        perturbation
            Perturbation; `None`: the only one there is.
        adata
            Cells; by default the model's own.

        Returns
        -------
        Series by cell, mean over the ensemble, 1 for a cell of average weight and NaN for treated cells: put it into
        ``adata.obs`` to plot it.
        """
        self._check_if_trained(warn=False, message="The model is not trained. Call `train()` first.")
        manager, user = self._query(adata, None)
        rows = np.arange(manager.adata.n_obs)
        control = rows[self._is_control(manager, rows)]
        context = self._contexts_of(manager, control)
        result = np.full(len(rows), np.nan)
        module = self.module
        e = module.indicator(self._question_action(perturbation, 1))
        for code in np.unique(context):
            own = control[context == code]
            with torch.no_grad():
                z = [
                    module.encode(module.describe(module.standardised(module.normalised(c)))[None], e)
                    for c in self._cells(manager, own, 512)
                ]
                weight = module.aggregation.weights(torch.cat(z, 1))[0, ..., 0].mean(-1)
            result[own] = weight.cpu().numpy() * len(own)
        return pd.Series(result, index=user.obs_names, name="attention")


def _component(component: int, axes: NDArray[np.float64]) -> NDArray[np.float64]:
    whole = isinstance(component, (int, np.integer)) and not isinstance(component, bool)
    if not whole or not 0 <= component < len(axes):
        raise ValueError(f"`component` must be between 0 and {len(axes) - 1}, got {component!r}.")
    return axes[component]


def _shapley(
    function: Callable[[torch.Tensor], torch.Tensor], chosen: torch.Tensor, bag: torch.Tensor, n_samples: int, seed: int
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """Shapley values of a function of the chosen genes of cells.

    Parameters
    ----------
    function
        Of ``(n, n_members, n_selected)``.
    chosen
        Gene of each row of the selectors, ``(n_members, n_selected)``.
    bag
        Cells to explain, ``(n_cells, n_members, n_selected)``; background is 0, the mean of standardised genes.

    Returns
    -------
    Values and expression, ``(n_cells, n)``, and the n genes: a gene that several members chose is one feature.
    """
    from captum.attr import ShapleyValueSampling

    genes = np.unique(chosen.numpy())
    place = torch.as_tensor(np.searchsorted(genes, chosen.numpy()))
    # from the members' own choices back to one value per gene
    x = torch.zeros(len(bag), len(genes))
    x.scatter_(1, place.flatten().expand(len(bag), -1), bag.flatten(1))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        explainer = ShapleyValueSampling(lambda values: function(values[:, place]))
        value = explainer.attribute(x, baselines=torch.zeros_like(x), n_samples=n_samples)
    return value.double().numpy(), x.double().numpy(), genes
