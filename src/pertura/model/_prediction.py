"""Prediction, effects and latent states: one implementation for every model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from anndata import AnnData
from mudata import MuData
from numpy.typing import NDArray
from scvi.data import AnnDataManager

from ._arguments import check_draws, check_flag, check_key, check_whole
from ._engine import Question
from ._summaries import Predicted, SummaryMixin
from ._writeback import as_anndata, contexts_as_anndata, reserve, targets, write

if TYPE_CHECKING:
    from sparse import GCXS

Scale = Literal["log1p", "counts", "layer"]
DEFAULT_SAMPLES = 25
_DELTA = 0.1
_MAX_BYTES = 16 * 2**30


class PredictionMixin(SummaryMixin):
    """``predict_perturbation`` and its relatives, from what a module's counterfactual steps give."""

    def predict_perturbation(
        self,
        perturbation: str | Sequence[str] | None = None,
        *,
        adata: AnnData | MuData | None = None,
        indices: Sequence[int] | None = None,
        dose: float | Sequence[float] | None = None,
        n_samples: int = DEFAULT_SAMPLES,
        ci: float | None = 0.9,
        scale: Scale | None = None,
        by: Literal["cell", "context"] = "cell",
        key_added: str | None = None,
        return_anndata: bool = False,
        overwrite: bool = False,
        batch_size: int | None = None,
        seed: int | None = None,
    ) -> AnnData | None:
        """Predict what each cell would look like under a perturbation.

        The basal state of a cell is inferred from its own expression and its own perturbation, the perturbation is
        exchanged, and the result decoded with the cell's own measurement noise. Ask it of control cells to compare with
        measured perturbed cells.

        Parameters
        ----------
        perturbation
            A name, a combination ``"A+B"``, or a list of them. `None`: the only one there is.
        adata
            Cells to ask; by default the model's own. Genes are matched by name.
        indices
            Rows of `adata`; by default all.
        dose
            In the registered unit. A number holds for every member of a combination; several numbers are several
            questions. By default each perturbation's most frequent registered dose.
        n_samples
            Posterior-predictive draws per cell.
        ci
            Level of the interval in ``layers[key + "_low"]`` and ``["_high"]``; `None` leaves it out. The interval is
            of a cell's own expression, measurement noise included, and wider the further the question is from the data.
        scale
            ``"log1p"`` (default for counts): counts per 10,000, log1p, averaged over draws after the transform.
            ``"counts"``: counts at the cell's own depth. ``"layer"``: as registered (default for other data).
        by
            ``"cell"``: a prediction for each cell. ``"context"``: means of contexts, as :meth:`get_perturbation_effect` has
            them (from the control cells among the cells asked); always a new AnnData.
        key_added
            Where results go; by default ``"predicted_" + name``.
        return_anndata
            Return a new AnnData also for one name.
        overwrite
            Whether keys that are not pertura's may be overwritten.
        batch_size
            Cells read at a time. Neither the result nor, much, the memory depends on it: draws are made in blocks of 32
            MiB.
        seed
            Of the draws; by default ``scvi.settings.seed``, else 0.

        Returns
        -------
        `None` for one name: ``layers[key]`` (with ``_low`` and ``_high``), ``obsm["X_" + key]``, ``obsm["X_basal"]``,
        ``uns[key + "_effect"]`` and ``uns[key]`` of `adata` are set; rows outside `indices` are NaN. For a list, or
        with `return_anndata`, a new AnnData with one row per cell and perturbation, the prediction in ``X``. With
        ``by="context"`` one row per context and perturbation: mean expression under it in ``X``, its interval in
        ``layers["low"]`` and ``["high"]``, ``layers["control"]`` and ``layers["effect"]`` beside it.

        Raises
        ------
        ValueError
            For a perturbation that the model has no way to represent, and for wrong arguments.
        """
        check_flag("return_anndata", return_anndata)
        check_flag("overwrite", overwrite)
        if by not in ("cell", "context"):
            raise ValueError(f"`by` must be 'cell' or 'context', got {by!r}.")
        if by == "context" and key_added is not None:
            raise ValueError(
                f"`key_added`: rows of contexts have no place in `adata`, so nothing is written to {key_added!r}. "
                "Leave it out: a new AnnData is returned."
            )
        single = (isinstance(perturbation, str) or perturbation is None) and np.ndim(dose) == 0
        questions = self._questions(perturbation, dose)
        key = key_added if key_added is not None else f"predicted_{questions[0].label}".replace("/", "_")
        check_key(key)
        check_draws(n_samples, ci, batch_size)
        options = {
            "n_samples": n_samples,
            "scale": self._resolve_scale(scale),
            "seed": self._seed(seed),
            "batch_size": batch_size,
        }
        manager, user = self._query(adata, indices)
        rows = self._rows(user, indices)
        self._check_known(user, manager, rows)
        asked = self._asked(questions, ci, options)
        if by == "context":
            rows = self._controls_or_all(manager, rows)
            table = self._effects_of(manager, rows, questions, ci=ci or 0.9, delta=_DELTA, **options)
            names = np.asarray(self._context_names(manager), dtype=object)[self._contexts_of(manager, rows)]
            return contexts_as_anndata(self, user, table, pd.Series(names).value_counts(), asked)
        if not single or return_anndata:
            n_bytes = len(rows) * len(questions) * len(self.gene_names) * 4 * (1 if ci is None else 3)
            if n_bytes > _MAX_BYTES:
                raise ValueError(
                    f"`perturbation`: {len(questions)} perturbations of {len(rows)} cells would fill "
                    f"{n_bytes / 2**30:.0f} GiB. Ask in parts with `iter_predictions`, or for "
                    "`get_perturbation_effect`."
                )
            predicted = self._predict_cells(manager, rows, questions, ci=ci, **options)
            return self._as_anndata(manager, user, rows, questions, predicted, asked)
        reserve(user, targets(key, ci), overwrite)
        sums = self._effect_sums(manager, rows, 1, n_samples)
        predicted = self._predict_cells(manager, rows, questions, ci=ci, effects=sums, **options)
        table = self._effect_table(manager, sums, questions, ci=ci or 0.9, delta=_DELTA, scale=options["scale"])
        write(self, user, rows, key, predicted, table, asked)
        return None

    def iter_predictions(
        self,
        perturbation: str | Sequence[str] | None = None,
        *,
        adata: AnnData | MuData | None = None,
        indices: Sequence[int] | None = None,
        dose: float | Sequence[float] | None = None,
        n_samples: int = DEFAULT_SAMPLES,
        ci: float | None = 0.9,
        scale: Scale | None = None,
        batch_size: int | None = None,
        seed: int | None = None,
        chunk_size: int = 1024,
    ) -> Iterator[AnnData]:
        """Predictions as in :meth:`predict_perturbation`, some cells at a time: memory does not grow with their number.

        Parameters
        ----------
        perturbation, adata, indices, dose, n_samples, ci, scale, batch_size, seed
            As in :meth:`predict_perturbation`.
        chunk_size
            Cells per AnnData.

        Yields
        ------
        AnnData with one row per cell of the chunk and perturbation, the same numbers as all at once.
        """
        check_whole("chunk_size", chunk_size)
        questions = self._questions(perturbation, dose)
        check_draws(n_samples, ci, batch_size)
        options = {
            "n_samples": n_samples,
            "scale": self._resolve_scale(scale),
            "seed": self._seed(seed),
            "batch_size": batch_size,
        }
        manager, user = self._query(adata, indices)
        rows = self._rows(user, indices)
        self._check_known(user, manager, rows)
        asked = self._asked(questions, ci, options)
        # arguments are checked when this is called, not when the first chunk is asked
        return self._chunks(manager, user, rows, questions, asked, chunk_size, ci=ci, **options)

    def get_perturbation_effect(
        self,
        perturbation: str | Sequence[str] | None = None,
        *,
        adata: AnnData | MuData | None = None,
        indices: Sequence[int] | None = None,
        dose: float | Sequence[float] | None = None,
        n_samples: int = DEFAULT_SAMPLES,
        ci: float = 0.9,
        delta: float = _DELTA,
        scale: Scale | None = None,
        batch_size: int | None = None,
        seed: int | None = None,
    ) -> pd.DataFrame:
        """Effect of a perturbation on the mean expression of each gene in each context.

        Parameters
        ----------
        perturbation, adata, indices, dose, n_samples, scale, batch_size, seed
            As in :meth:`predict_perturbation`. Effects start from the control cells among the cells asked, in contexts
            that have none from all of them.
        ci
            Level of the interval.
        delta
            Size from which an effect counts: ``proba_de`` is the probability that it is larger in absolute value.

        Returns
        -------
        One row per perturbation, context and gene: ``perturbation, context, gene, lfc_mean, lfc_sd, ci_low, ci_high,
        proba_de, log2fc, mean_control, mean_perturbed, novelty`` (and ``dose``). ``lfc_*`` and ``ci_*`` are mean
        differences on `scale` (for ``"log1p"`` natural-log units, as ``X`` after :func:`scanpy.pp.log1p`). The sd holds
        the posterior of the model and how far its effects were from measured ones; it is wider for contexts, doses,
        combinations and perturbations that were not seen.
        """
        questions = self._questions(perturbation, dose)
        if ci is None:
            raise ValueError("`ci` must be between 0 and 1, got None.")
        check_draws(n_samples, ci, batch_size)
        if isinstance(delta, bool) or not isinstance(delta, (int, float, np.number)) or not delta >= 0:
            raise ValueError(f"`delta` must be a number that is not negative, got {delta!r}.")
        options = {
            "n_samples": n_samples,
            "scale": self._resolve_scale(scale),
            "seed": self._seed(seed),
            "batch_size": batch_size,
        }
        manager, user = self._query(adata, indices)
        rows = self._rows(user, indices)
        self._check_known(user, manager, rows)
        rows = self._controls_or_all(manager, rows)
        return self._effects_of(manager, rows, questions, ci=ci, delta=delta, **options)

    def get_latent_representation(
        self,
        adata: AnnData | MuData | None = None,
        *,
        indices: Sequence[int] | None = None,
        kind: Literal["basal", "perturbed"] = "basal",
        n_samples: int = DEFAULT_SAMPLES,
        batch_size: int | None = None,
        seed: int | None = None,
    ) -> NDArray[np.float32]:
        """Latent state of each cell, posterior mean, shape ``(n_cells, n_latent)``.

        Parameters
        ----------
        adata, indices, n_samples, batch_size, seed
            As in :meth:`predict_perturbation`.
        kind
            ``"basal"``: the state before the cell's own perturbation; ``"perturbed"``: after it.
        """
        if kind not in ("basal", "perturbed"):
            raise ValueError(f"`kind` must be 'basal' or 'perturbed', got {kind!r}.")
        check_draws(n_samples, None, batch_size)
        options = {"n_samples": n_samples, "seed": self._seed(seed), "batch_size": batch_size}
        manager, user = self._query(adata, indices)
        rows = self._rows(user, indices)
        self._check_known(user, manager, rows)
        engine = self._engine(manager, scale=self._resolve_scale(None), **options)
        states = (
            block.basal.z if kind == "basal" else block.latent(block.cells.action) for block in engine.blocks(rows)
        )
        return np.concatenate([z.mean(0).cpu().numpy() for z in states])

    def posterior_predictive_sample(
        self,
        adata: AnnData | MuData | None = None,
        n_samples: int = 1,
        batch_size: int | None = None,
        indices: Sequence[int] | None = None,
        seed: int | None = None,
    ) -> GCXS:
        """Replicates of the measured cells under their own perturbation, measurement noise drawn anew.

        Parameters
        ----------
        adata, n_samples, batch_size, indices, seed
            As in :meth:`predict_perturbation`.

        Returns
        -------
        Sparse array ``(n_cells, n_genes, n_samples)`` on the model's native scale, as
        :class:`scvi.criticism.PosteriorPredictiveCheck` reads it.
        """
        from sparse import GCXS, concatenate

        check_draws(n_samples, None, batch_size)
        options = {"n_samples": n_samples, "seed": self._seed(seed), "batch_size": batch_size}
        manager, user = self._query(adata, indices)
        rows = self._rows(user, indices)
        self._check_known(user, manager, rows)
        engine = self._engine(manager, scale=self._resolve_scale(None), **options)
        parts = [
            GCXS.from_numpy(block.replicate().permute(1, 2, 0).cpu().numpy(), compressed_axes=(0,))
            for block in engine.blocks(rows)
        ]
        return concatenate(parts, axis=0)

    # -- shapes of results ------------------------------------------------------------------------------------------

    def _asked(self, questions: Sequence[Question], ci: float | None, options: dict[str, Any]) -> dict[str, Any]:
        """What goes into the provenance of a result."""
        return {
            "perturbation": [q.label for q in questions],
            "dose": [q.dose_text for q in questions] if self.vocabulary.has_dose else None,
            "novelty": [self._discrepancy.step(q) for q in questions],
            "ci": ci,
            **{name: options[name] for name in ("n_samples", "scale", "seed")},
        }

    def _as_anndata(
        self,
        manager: AnnDataManager,
        user: AnnData,
        rows: NDArray[np.int64],
        questions: Sequence[Question],
        predicted: Predicted,
        asked: dict[str, Any],
    ) -> AnnData:
        discrepancy, names = self._discrepancy, self._context_names(manager)
        table = np.array([[discrepancy.novelty(q, c) for c in names] for q in questions], dtype=object)
        novelty = table[:, self._contexts_of(manager, rows)]
        return as_anndata(self, user, rows, questions, predicted, novelty, asked)

    def _chunks(
        self,
        manager: AnnDataManager,
        user: AnnData,
        rows: NDArray[np.int64],
        questions: Sequence[Question],
        asked: dict[str, Any],
        chunk_size: int,
        **options: Any,
    ) -> Iterator[AnnData]:
        waiting: list[Predicted] = []
        n_waiting = start = 0
        for part in self._predict_blocks(manager, rows, questions, **options):
            waiting.append(part)
            n_waiting += part.n_cells
            is_last = start + n_waiting == len(rows)
            while n_waiting >= chunk_size or (is_last and n_waiting):
                joined = Predicted.concatenate(waiting)
                n = min(chunk_size, n_waiting)
                here = rows[start : start + n]
                yield self._as_anndata(manager, user, here, questions, joined.take(slice(0, n)), asked)
                waiting, n_waiting, start = [joined.take(slice(n, None))], n_waiting - n, start + n
