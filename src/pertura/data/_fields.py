"""Fields that register expression, perturbations and contexts with scvi-tools' data manager."""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import rich.pretty
import rich.table
from anndata import AnnData
from scvi.data.fields import BaseAnnDataField, CategoricalObsField, LayerField

from ._cells import Expression
from ._constants import EFFECTS, KEYS
from ._library import LIBRARY_COLUMN, Library, describe, find_library, stream
from ._validation import check_expression, smallest_value
from ._vocabulary import Vocabulary, build_vocabulary, encode_cells

logger = logging.getLogger(__name__)

_OBSM_KEY = f"_scvi_{KEYS.PERTURBATION}"


@cache
def _say(text: str) -> None:
    """Log a message once: baselines beside a model register the same data again."""
    logger.info(text)


class ExpressionField(LayerField):
    """Expression, with the kind of its values, whether the smallest is 0, and the libraries of cells.

    Kinds are ``"counts"``, ``"continuous"`` and ``"effects"``: of rows that are differences from a control of 0.

    Parameters
    ----------
    layer
        Layer with the expression; `None` for ``X``.
    size_factor_key
        Column of ``obs`` with size factors.
    values
        ``"expression"`` of cells, or ``"effects"`` of conditions.
    """

    KIND, NONNEGATIVE, LIBRARY = "data_kind", "nonnegative", "library"

    def __init__(self, layer: str | None, size_factor_key: str | None = None, values: str = "expression") -> None:
        super().__init__(KEYS.X, layer, is_count_data=False, correct_data_format=False)
        self.layer, self.size_factor_key, self.values = layer, size_factor_key, values

    def register_field(self, adata: AnnData) -> dict[str, Any]:
        """Register, and look at the values."""
        kind = check_expression(adata, self.layer)
        kind = EFFECTS if self.values == EFFECTS else kind
        smallest = 0.0 if kind == "counts" else smallest_value(adata, self.layer)
        state = {**super().register_field(adata), self.KIND: kind, self.NONNEGATIVE: smallest == 0 and kind != EFFECTS}
        needs_x = self.size_factor_key is None and kind == "counts"
        expression, x = sources(adata, self.layer, adata.var_names, kind, needs_x)
        library, values = find_library(expression, x, adata.obs, self.layer, self.size_factor_key)
        if library["source"] == "X":
            adata.obs[LIBRARY_COLUMN] = values
        _say(f"Library of a cell: {describe(library, adata.n_vars)}.")
        return {**state, self.LIBRARY: library}

    def transfer_field(self, state_registry: dict, adata_target: AnnData, **kwargs: Any) -> dict[str, Any]:
        """Register new data; values must be of the model's kind. Genes stay the model's own, in its order."""
        self.validate_field(adata_target)
        found, wanted = check_expression(adata_target, self.layer), state_registry[self.KIND]
        if wanted == "counts" and found != "counts":
            raise ValueError(not_counts(self.layer))
        if state_registry[self.LIBRARY]["source"] == "X":
            expression, x = sources(adata_target, self.layer, state_registry[self.COLUMN_NAMES_KEY], wanted, True)
            rows = np.arange(adata_target.n_obs)
            library = Library.of_query(state_registry[self.LIBRARY], expression, x, adata_target.obs, rows)
            adata_target.obs[LIBRARY_COLUMN] = stream(library, expression, adata_target.n_obs)
        return {**state_registry, self.N_OBS_KEY: adata_target.n_obs}

    def view_state_registry(self, state_registry: dict) -> rich.table.Table:
        """Which library was taken."""
        table = rich.table.Table(title=f"{self.registry_key} State Registry")
        for column in ("Source Location", "Values", "Library"):
            table.add_column(column, justify="center", overflow="fold")
        source = "adata.X" if self.layer is None else f"adata.layers[{self.layer!r}]"
        n_genes = len(state_registry[self.COLUMN_NAMES_KEY])
        table.add_row(source, state_registry[self.KIND], describe(state_registry[self.LIBRARY], n_genes))
        return table


def sources(
    adata: AnnData, layer: str | None, genes: Any, kind: str, needs_x: bool
) -> tuple[Expression, Expression | None]:
    """Registered expression of some genes, and that in ``X`` where it is needed and another."""
    needs_x = needs_x and layer is not None and adata.X is not None
    x = Expression.of(adata, None, genes, "continuous") if needs_x else None
    return Expression.of(adata, layer, genes, kind), x


def not_counts(layer: str | None) -> str:
    """What to say of other values where counts are needed."""
    where = "X" if layer is None else f"layers[{layer!r}]"
    return (
        "`adata`: the model was trained on counts, but these values are not (negative or fractional). "
        f"Put the counts where they were in training ({where})."
    )


class PerturbationField(BaseAnnDataField):
    """What was done to each cell: component codes and doses, ``obsm["_scvi_perturbation"]``.

    Parameters
    ----------
    perturbation_key
        Column of ``obs`` with the label; `None`: no cell was perturbed.
    control
        Label of unperturbed cells.
    dose_key
        Column of ``obs`` with the dose.
    delimiter
        Joins the members of a combination.
    features
        Descriptions of perturbations, one row each.
    mudata
        Where the labels come from in a MuData; see ``setup_mudata``.
    """

    registry_key = KEYS.PERTURBATION
    attr_name = "obsm"
    attr_key = _OBSM_KEY
    is_empty = False

    def __init__(
        self,
        perturbation_key: str | None,
        control: str,
        *,
        dose_key: str | None = None,
        delimiter: str = "+",
        features: pd.DataFrame | None = None,
        mudata: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.perturbation_key = perturbation_key
        self.control = control
        self.dose_key = dose_key
        self.delimiter = delimiter
        self.features = features
        self.mudata = mudata

    def validate_field(self, adata: AnnData) -> None:
        """Check that the columns are there."""
        super().validate_field(adata)
        for argument, key in (("perturbation_key", self.perturbation_key), ("dose_key", self.dose_key)):
            if key is not None and key not in adata.obs:
                raise ValueError(
                    f"`{argument}`: {key!r} is not a column of `adata.obs` (columns: {list(adata.obs.columns)}). "
                    f"Add it; cells that were not perturbed carry {self.control!r} as their perturbation."
                )

    def register_field(self, adata: AnnData) -> dict[str, Any]:
        """Build the vocabulary and encode the cells."""
        super().register_field(adata)
        labels, doses = self._columns(adata)
        vocabulary = build_vocabulary(
            labels, self.control, delimiter=self.delimiter, doses=doses, features=self.features
        )
        adata.obsm[_OBSM_KEY] = encode_cells(vocabulary, labels, doses)
        return {**vocabulary.to_registry(), "mudata": self.mudata}

    def transfer_field(self, state_registry: dict, adata_target: AnnData, **kwargs: Any) -> dict[str, Any]:
        """Encode new cells with the vocabulary of the model; unknown perturbations get the code -2."""
        super().transfer_field(state_registry, adata_target, **kwargs)
        self.validate_field(adata_target)
        vocabulary = Vocabulary.from_registry(state_registry)
        encoded = encode_cells(vocabulary, *self._columns(adata_target), order=vocabulary.order)
        adata_target.obsm[_OBSM_KEY] = encoded
        return dict(state_registry)

    def _columns(self, adata: AnnData) -> tuple[pd.Series, pd.Series | None]:
        if self.perturbation_key is None:
            return pd.Series([self.control] * adata.n_obs, dtype=object), None
        labels = adata.obs[self.perturbation_key].astype(str).reset_index(drop=True)
        if self.dose_key is None:
            return labels, None
        return labels, adata.obs[self.dose_key].reset_index(drop=True)

    def get_summary_stats(self, state_registry: dict) -> dict[str, int]:
        """Number of single perturbations."""
        return {"n_perturbations": len(state_registry["names"])}

    def view_state_registry(self, state_registry: dict) -> rich.table.Table:
        """Names, codes and doses."""
        table = rich.table.Table(title=f"{self.registry_key} State Registry")
        for column in ("Source Location", "Perturbation", "Code", "Doses"):
            table.add_column(column, justify="center", overflow="fold")
        source = "none" if self.perturbation_key is None else f"adata.obs[{self.perturbation_key!r}]"
        table.add_row(source, f"{state_registry['control']} (control)", "", "")
        doses = state_registry["doses"] if state_registry["has_dose"] else [()] * len(state_registry["names"])
        for code, (name, own) in enumerate(zip(state_registry["names"], doses, strict=True)):
            table.add_row("", str(name), str(code), ", ".join(f"{d:g}" for d in own))
        for members in state_registry["combinations"]:
            table.add_row("", state_registry["delimiter"].join(members), "", "")
        return table


class ContextField(CategoricalObsField):
    """Context of each cell. New contexts are legitimate questions: they extend the categories of the queried data."""

    def transfer_field(self, state_registry: dict, adata_target: AnnData, **kwargs: Any) -> dict[str, Any]:
        """Encode the contexts of new cells; those the model has not seen follow the registered ones."""
        kwargs["extend_categories"] = True
        return super().transfer_field(state_registry, adata_target, **kwargs)
