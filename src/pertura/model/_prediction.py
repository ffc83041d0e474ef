"""Prediction, effects and latent states: one implementation for every model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from mudata import MuData
from scipy import stats
from scvi import settings
from scvi.data import AnnDataManager

from pertura.data import _mudata
from pertura.data._constants import KEYS
from pertura.data._datamodule import Batch, CellDataset
from pertura.data._vocabulary import Vocabulary
from pertura.module._base import Cells

from ._engine import Draws, Question, draw, rescale
from ._writeback import provenance, ranked_effects, reserve

if TYPE_CHECKING:
    from pertura.module._base import PerturbationModule

Scale = Literal["log1p", "counts", "layer"]
DEFAULT_SAMPLES = 25


class PredictionMixin:
    """``predict_perturbation`` and its relatives, from what a module's counterfactual steps give."""

    module: PerturbationModule
    vocabulary: Vocabulary
    _can_predict_features: bool = False

    # -- public -----------------------------------------------------------------------------------------------------

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
        key_added: str | None = None,
        return_anndata: bool = False,
        overwrite: bool = False,
        batch_size: int | None = None,
        seed: int | None = None,
    ) -> AnnData | None:
        """What would each cell look like under the perturbation?

        The basal state of a cell is inferred from its own expression and its own perturbation, the perturbation is exchanged,
        and the result decoded with the cell's own measurement noise. Ask it of control cells to compare with measured
        perturbed cells.

        Parameters
        ----------
        perturbation
            A name, a combination ``"A+B"``, or a list of them. `None`: the only one there is.
        adata
            Cells to ask; by default the model's own. Genes are matched by name.
        indices
            Rows of `adata`; by default all.
        dose
            In the registered unit. A number holds for every member of a combination; several numbers are several questions.
            By default each perturbation's most frequent registered dose.
        n_samples
            Posterior-predictive draws per cell.
        ci
            Level of the interval in ``layers[key + "_low"]`` and ``["_high"]``; `None` leaves it out. The interval is of a
            cell's own expression, measurement noise included.
        scale
            ``"log1p"`` (default for counts): counts per 10,000, log1p, averaged over draws after the transform. ``"counts"``:
            counts at the cell's own depth. ``"layer"``: as registered (default for other data).
        key_added
            Where results go; by default ``"predicted_" + name``.
        return_anndata
            Return a new AnnData also for one name.
        overwrite
            Whether keys that are not pertura's may be overwritten.
        batch_size
            Cells per minibatch; by default what 64 MiB of draws allow.
        seed
            Of the draws; by default ``scvi.settings.seed``, else 0.

        Returns
        -------
        `None` for one name: ``layers[key]`` (with ``_low`` and ``_high``), ``obsm["X_" + key]``, ``obsm["X_basal"]``,
        ``uns[key + "_effect"]`` and ``uns[key]`` of `adata` are set; rows outside `indices` are NaN. For a list, or with
        `return_anndata`, a new AnnData with one row per cell and perturbation, the prediction in ``X``.

        Raises
        ------
        ValueError
            For a perturbation that the model has no way to represent, and for wrong arguments.
        """
        single = (isinstance(perturbation, str) or perturbation is None) and np.ndim(dose) == 0
        questions = self._questions(perturbation, dose)
        scale = self._resolve_scale(scale)
        self._check_draws(n_samples, ci, batch_size)
        manager, user = self._query(adata)
        rows = self._rows(user, indices)
        seed = self._seed(seed)
        self._check_known(user, manager, rows)
        key = key_added or f"predicted_{questions[0].label}"
        in_place = single and not return_anndata
        if in_place:
            if not isinstance(key, str) or "/" in key:
                raise ValueError(f"`key_added` must be a string without '/', got {key!r}.")
            written = self._targets(key, ci)
            reserve(user, written, overwrite)
        else:
            wide = len(rows) * len(questions) * user.n_vars * 4 * (3 if ci else 1)
            if wide > 16 * 2**30:
                raise ValueError(
                    f"`perturbation`: {len(questions)} perturbations of {len(rows)} cells would fill {wide / 2**30:.0f} GiB. "
                    "Ask in parts with `iter_predictions`, or for `get_perturbation_effect`."
                )
        options = {"n_samples": n_samples, "scale": scale, "seed": seed, "batch_size": batch_size}
        result = self._predict_cells(manager, rows, questions, ci=ci, **options)
        asked = {
            "perturbation": [q.label for q in questions],
            "dose": [q.dose_text for q in questions] if self.vocabulary.has_dose else None,
            "novelty": [self.vocabulary.novelty(q.label) for q in questions],
            "ci": ci,
            "n_samples": n_samples,
            "scale": scale,
            "seed": seed,
        }
        effect_rows = self._controls_or_all(manager, rows)
        if not in_place:
            return self._as_anndata(user, rows, questions, result, asked)
        table = self._effect_table(manager, effect_rows, questions, ci=ci or 0.9, delta=0.1, **options)
        self._write(user, rows, key, questions[0], result, table, asked, written)
        return None

    def iter_predictions(
        self,
        perturbation: str | Sequence[str] | None = None,
        *,
        adata: AnnData | MuData | None = None,
        indices: Sequence[int] | None = None,
        chunk_size: int = 1024,
        **kwargs: Any,
    ) -> Iterator[AnnData]:
        """Predictions as in :meth:`predict_perturbation`, `chunk_size` cells at a time: memory does not grow with the data.

        Parameters
        ----------
        perturbation, adata, indices
            As in :meth:`predict_perturbation`.
        chunk_size
            Cells per AnnData.
        **kwargs
            Further arguments of :meth:`predict_perturbation`.
        """
        if chunk_size < 1:
            raise ValueError(f"`chunk_size` must be at least 1, got {chunk_size}.")
        user = self.adata if adata is None else adata
        n = (user.mod[self._mudata_settings()["rna_mod"]] if isinstance(user, MuData) else user).n_obs
        rows = np.arange(n) if indices is None else np.asarray(indices)
        for start in range(0, len(rows), chunk_size):
            part = self.predict_perturbation(
                perturbation,
                adata=adata,
                indices=rows[start : start + chunk_size],
                return_anndata=True,
                **kwargs,
            )
            yield part

    def get_perturbation_effect(
        self,
        perturbation: str | Sequence[str] | None = None,
        *,
        adata: AnnData | MuData | None = None,
        indices: Sequence[int] | None = None,
        dose: float | Sequence[float] | None = None,
        n_samples: int = DEFAULT_SAMPLES,
        ci: float = 0.9,
        delta: float = 0.1,
        scale: Scale | None = None,
        batch_size: int | None = None,
        seed: int | None = None,
    ) -> pd.DataFrame:
        """Effect of a perturbation on the mean expression of each gene in each context.

        Parameters
        ----------
        perturbation, adata, indices, dose, n_samples, scale, batch_size, seed
            As in :meth:`predict_perturbation`. Effects start from the control cells among the cells asked, from all of them
            where there are none.
        ci
            Level of the interval.
        delta
            Size from which an effect counts: ``proba_de`` is the probability that it is larger in absolute value.

        Returns
        -------
        One row per perturbation, context and gene: ``perturbation, context, gene, lfc_mean, lfc_sd, ci_low, ci_high, proba_de,
        log2fc, mean_control, mean_perturbed, novelty`` (and ``dose``). ``lfc_*`` and ``ci_*`` are mean differences on
        `scale` (for ``"log1p"`` natural-log units, as ``X`` after :func:`scanpy.pp.log1p`). The sd holds the posterior of the
        model and how far its effects were from measured ones; it is wider for contexts, combinations and perturbations
        that were not seen.
        """
        questions = self._questions(perturbation, dose)
        scale = self._resolve_scale(scale)
        if ci is None:
            raise ValueError("`ci` must be between 0 and 1, got None.")
        self._check_draws(n_samples, ci, batch_size)
        if not delta >= 0:
            raise ValueError(f"`delta` must not be negative, got {delta}.")
        manager, user = self._query(adata)
        rows = self._rows(user, indices)
        self._check_known(user, manager, rows)
        rows = self._controls_or_all(manager, rows)
        return self._effect_table(
            manager,
            rows,
            questions,
            n_samples=n_samples,
            ci=ci,
            delta=delta,
            scale=scale,
            seed=self._seed(seed),
            batch_size=batch_size,
        )

    def get_latent_representation(
        self,
        adata: AnnData | MuData | None = None,
        *,
        indices: Sequence[int] | None = None,
        kind: Literal["basal", "perturbed"] = "basal",
        n_samples: int = DEFAULT_SAMPLES,
        batch_size: int | None = None,
        seed: int | None = None,
    ) -> np.ndarray:
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
        self._check_draws(n_samples, None, batch_size)
        manager, user = self._query(adata)
        rows = self._rows(user, indices)
        self._check_known(user, manager, rows)
        globals_ = self._globals(manager, n_samples, self._seed(seed))
        out = []
        for cells in self._cells(manager, rows, batch_size or 512):
            with torch.no_grad(), torch.random.fork_rng(devices=self._cuda()):
                torch.manual_seed(self._seed(seed))
                basal = self.module.abduct(cells, n_samples, globals_)
                z = basal.z if kind == "basal" else self.module.act(basal, cells.action, globals_)
            out.append(z.mean(0).cpu().numpy())
        return np.concatenate(out)

    def posterior_predictive_sample(
        self,
        adata: AnnData | None = None,
        n_samples: int = 1,
        batch_size: int | None = None,
        indices: Sequence[int] | None = None,
        seed: int | None = None,
        **kwargs: Any,
    ):
        """Replicates of the measured cells under their own perturbation, measurement noise drawn anew.

        Returns
        -------
        Sparse array ``(n_cells, n_genes, n_samples)`` as :class:`scvi.criticism.PosteriorPredictiveCheck` reads it.
        """
        from sparse import GCXS, concatenate

        manager, user = self._query(adata)
        rows = self._rows(user, indices)
        self._check_known(user, manager, rows)
        globals_ = self._globals(manager, n_samples, self._seed(seed))
        parts = []
        for i, cells in enumerate(self._cells(manager, rows, batch_size or 128)):
            with torch.no_grad(), torch.random.fork_rng(devices=self._cuda()):
                torch.manual_seed(self._seed(seed) + i)
                basal = self.module.abduct(cells, n_samples, globals_)
                z = self.module.act(basal, cells.action, globals_)
                basal.noise = self.module.fresh_noise(z, basal)
                x = self.module.decode(z, basal)
            parts.append(GCXS.from_numpy(x.permute(1, 2, 0).cpu().numpy()))
        return concatenate(parts, axis=0)

    # -- arguments --------------------------------------------------------------------------------------------------

    def _resolve_scale(self, scale: str | None) -> str:
        if scale is None:
            return "log1p" if self.data_kind == "counts" else "layer"
        allowed = ("log1p", "counts", "layer") if self.data_kind == "counts" else ("layer",)
        if scale not in ("log1p", "counts", "layer"):
            raise ValueError(f"`scale` must be 'log1p', 'counts' or 'layer', got {scale!r}.")
        if scale not in allowed:
            raise ValueError(
                f"`scale`: {scale!r} needs a model of counts, but the registered layer holds other values. "
                "Use scale='layer', or register the counts."
            )
        return "counts" if scale == "layer" and self.data_kind == "counts" else scale

    @staticmethod
    def _check_draws(n_samples: Any, ci: Any, batch_size: Any) -> None:
        if not isinstance(n_samples, (int, np.integer)) or n_samples < 1:
            raise ValueError(f"`n_samples` must be a whole number of at least 1, got {n_samples!r}.")
        if ci is not None and not (isinstance(ci, (int, float)) and 0 < ci < 1):
            raise ValueError(f"`ci` must be between 0 and 1 (0.9 is a 90 % interval), or None, got {ci!r}.")
        if ci is not None and n_samples < 2:
            raise ValueError(
                f"`ci` needs at least 2 draws, but `n_samples` is {n_samples}. Raise it or pass `ci=None`."
            )
        if batch_size is not None and (not isinstance(batch_size, (int, np.integer)) or batch_size < 1):
            raise ValueError(f"`batch_size` must be a whole number of at least 1, got {batch_size!r}.")

    @staticmethod
    def _seed(seed: int | None) -> int:
        if seed is None:
            return settings.seed if settings.seed is not None else 0
        if not isinstance(seed, (int, np.integer)) or seed < 0:
            raise ValueError(f"`seed` must be a whole number that is not negative, got {seed!r}.")
        return int(seed)

    def _questions(self, perturbation: Any, dose: Any) -> list[Question]:
        vocabulary = self.vocabulary
        if perturbation is None:
            if len(vocabulary.names) != 1:
                known = ", ".join(vocabulary.labels[:8])
                raise ValueError(
                    f"`perturbation`: the model knows {len(vocabulary.labels)} ({known}, …). Name one, or a list of them."
                )
            perturbation = vocabulary.names[0]
        labels = [perturbation] if isinstance(perturbation, str) else list(perturbation)
        if not labels or not all(isinstance(label, str) for label in labels):
            raise ValueError(
                f"`perturbation` must be a name or a non-empty list of names, got {perturbation!r}."
            )
        doses = [None] if dose is None else np.atleast_1d(np.asarray(dose, dtype=float)).tolist()
        for value in doses:
            if value is None:
                continue
            if not vocabulary.has_dose:
                raise ValueError(
                    f"`dose`: {value:g} was asked, but the model was registered without doses. "
                    "Leave `dose` out, or set the data up with `dose_key`."
                )
            if not np.isfinite(value) or value < 0:
                raise ValueError(f"`dose` must be finite and not negative, got {value:g}.")
        questions = []
        for label in labels:
            self._check_representable(label)
            members = vocabulary.parse(label)
            lookup = {name: i for i, name in enumerate(vocabulary.names)}
            for value in doses:
                reference = [vocabulary.reference_dose[lookup[m]] if m in lookup else 1.0 for m in members]
                each = tuple(reference if value is None else [value] * len(members))
                questions.append(Question(vocabulary.canonical(label), each))
        if len(set(questions)) < len(questions):
            raise ValueError("`perturbation`: the same perturbation was asked twice.")
        return questions

    def _check_representable(self, label: str) -> None:
        vocabulary = self.vocabulary
        novelty = vocabulary.novelty(label)
        if novelty == "unseen" or (novelty == "unseen with features" and not self._can_predict_features):
            from difflib import get_close_matches

            new = [m for m in vocabulary.parse(label) if m not in vocabulary.names]
            close = get_close_matches(new[0], vocabulary.names, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            remedy = (
                "Register descriptions of perturbations, this one included, with `perturbation_features_key`."
                if self._can_predict_features
                else f"{type(self).__name__} can not represent a new perturbation; PertVAE or baseline.Linear with "
                "`perturbation_features_key` can."
            )
            known = ", ".join(vocabulary.names[:8])
            raise ValueError(
                f"`perturbation`: {', '.join(map(repr, new))} was not seen in training"
                f"{' and has no features' if novelty == 'unseen' and vocabulary.features is not None else ''} "
                f"(known: {known}{', …' if len(vocabulary.names) > 8 else ''}).{hint} {remedy}"
            )

    def _rows(self, user: AnnData, indices: Any) -> np.ndarray:
        if indices is None:
            return np.arange(user.n_obs)
        rows = np.asarray(indices)
        if rows.dtype == bool and rows.shape == (user.n_obs,):
            rows = np.flatnonzero(rows)
        if rows.ndim != 1 or not np.issubdtype(rows.dtype, np.integer):
            raise ValueError("`indices` must be row numbers, or a boolean for each cell.")
        if not len(rows) or rows.min() < 0 or rows.max() >= user.n_obs:
            raise ValueError(
                f"`indices` must be between 0 and {user.n_obs - 1} and not empty, got "
                f"{f'{rows.min()} to {rows.max()}' if len(rows) else 'none'}."
            )
        if len(np.unique(rows)) < len(rows):
            raise ValueError("`indices`: a cell was named twice.")
        return rows

    # -- queries ----------------------------------------------------------------------------------------------------

    def _mudata_settings(self) -> dict[str, Any]:
        state = self._state(KEYS.PERTURBATION)
        if "mudata" not in state:
            raise ValueError(
                "`adata` is a MuData, but the model was set up with an AnnData. Pass the expression modality."
            )
        return state["mudata"]

    def _query(self, adata: AnnData | MuData | None) -> tuple[AnnDataManager, AnnData]:
        """Registered form of the cells asked, and where results are written; a foreign AnnData is not marked."""
        self._check_if_trained(
            warn=False, message="The model is not trained. Call `train()` before predicting."
        )
        if adata is None or adata is self.adata:
            if self.adata is None:
                raise ValueError(
                    "`adata`: the model was loaded without data, so pass the cells to predict for."
                )
            return self.adata_manager, self.adata
        if isinstance(adata, MuData):
            user = _mudata.annotate(adata, self._mudata_settings())
            if user is self.adata:
                return self.adata_manager, self.adata
        elif isinstance(adata, AnnData):
            user = adata
        else:
            raise ValueError(f"`adata` must be an AnnData, got {type(adata).__name__}.")
        return self._transfer(user), user

    def _transfer(self, user: AnnData) -> AnnDataManager:
        genes = self.gene_names
        position = pd.Index(user.var_names.astype(str)).get_indexer(genes)
        if (position < 0).any():
            missing = genes[position < 0]
            raise ValueError(
                f"`adata`: {len(missing)} of the model's {len(genes)} genes are missing "
                f"({', '.join(missing[:5])}{', …' if len(missing) > 5 else ''}). Genes are matched by name: use the same "
                "annotation, and add zeros only for genes that really were not expressed."
            )
        layer = self._argument("layer")
        if layer is not None and layer not in user.layers:
            raise ValueError(
                f"`adata`: the model was trained on layer {layer!r}, which `adata.layers` does not have."
            )
        x = user.X if layer is None else user.layers[layer]
        if user.n_vars != len(genes) or (position != np.arange(len(genes))).any():
            if user.isbacked:
                raise ValueError(
                    "`adata` is backed and its genes are ordered differently. Load it with `adata.to_memory()`."
                )
            x = x[:, position]
        columns = {}
        for argument in ("perturbation_key", "dose_key", "context_key", "batch_key", "size_factor_key"):
            name = self._argument(argument)
            if name is None:
                continue
            if name not in user.obs:
                remedy = (
                    f" For unperturbed cells set `adata.obs[{name!r}] = {self.vocabulary.control!r}`."
                    if argument == "perturbation_key"
                    else ""
                )
                raise ValueError(
                    f"`adata`: the column {name!r} of `obs`, registered as `{argument}`, is missing.{remedy}"
                )
            columns[name] = user.obs[name].to_numpy()
        if self._argument("batch_key") is not None:
            known = {str(b) for b in self._state(KEYS.BATCH)["categorical_mapping"]}
            new = sorted({str(b) for b in columns[self._argument("batch_key")]} - known)
            if new:
                raise ValueError(
                    f"`adata`: batch {new[0]!r} was not in training (known: {', '.join(sorted(known)[:8])}). "
                    "Assign the cells to a known batch, or train without `batch_key`."
                )
        light = AnnData(
            X=None if user.isbacked else x,
            obs=pd.DataFrame(columns, index=user.obs_names),
            var=pd.DataFrame(index=genes),
            layers=None if layer is None or user.isbacked else {layer: x},
        )
        if user.isbacked:
            light = user  # its own file is the only place where the values are
        manager = AnnDataManager(fields=self._fields(self.registry["setup_args"]), setup_method_args={})
        manager.register_fields(light, self.registry)
        return manager

    def _check_known(self, user: AnnData, manager: AnnDataManager, rows: np.ndarray) -> None:
        """Cells whose own perturbation the model does not know can not be taken back to their basal state."""
        codes = np.asarray(manager.adata.obsm["_scvi_perturbation"])[rows]
        unknown = (codes[:, : codes.shape[1] // 2] == -2).any(1)
        if unknown.any():
            column = user.obs[self._argument("perturbation_key")].astype(str)
            label = column.iloc[rows[np.flatnonzero(unknown)[0]]]
            raise ValueError(
                f"`adata`: {int(unknown.sum())} cells carry perturbations that the model has not seen, such as {label!r}; their "
                "basal state can not be inferred. Ask control cells: `indices=np.flatnonzero(adata.obs"
                f"[{self._argument('perturbation_key')!r}] == {self.vocabulary.control!r})`."
            )

    def _controls_or_all(self, manager: AnnDataManager, rows: np.ndarray) -> np.ndarray:
        """Control cells among the rows, by context; all cells of a context that has none."""
        codes = np.asarray(manager.adata.obsm["_scvi_perturbation"])[rows]
        half = codes.shape[1] // 2
        control = ~((codes[:, :half] >= 0) & (codes[:, half:] > 0)).any(1)
        context = np.asarray(manager.adata.obs["_scvi_context"])[rows]
        covered = np.isin(context, np.unique(context[control]))
        return rows[control | ~covered]

    def _context_names(self, manager: AnnDataManager) -> list[str]:
        if self._argument("context_key") is None:
            return ["all"]
        return [str(c) for c in manager.get_state_registry(KEYS.CONTEXT)["categorical_mapping"]]

    def _cuda(self) -> list:
        device = next(iter(self.module.state_dict().values())).device
        return [device] if device.type == "cuda" else []

    def _tensors(
        self, manager: AnnDataManager, rows: np.ndarray, batch_size: int
    ) -> Iterator[dict[str, torch.Tensor]]:
        device = next(iter(self.module.state_dict().values())).device
        dataset = CellDataset(manager)
        for start in range(0, len(rows), batch_size):
            tensors = dataset[Batch(rows[start : start + batch_size], 0)]
            tensors.pop("n_pairs")
            yield {k: v.to(device) for k, v in tensors.items()}

    def _cells(self, manager: AnnDataManager, rows: np.ndarray, batch_size: int) -> Iterator[Cells]:
        yield from map(Cells.from_tensors, self._tensors(manager, rows, batch_size))

    def _globals(self, manager: AnnDataManager, n_samples: int, seed: int) -> dict[str, torch.Tensor]:
        """Draws of global parameters, and what a model learns of the query before it predicts."""
        self.module.eval()
        with torch.no_grad(), torch.random.fork_rng(devices=self._cuda()):
            torch.manual_seed(seed)
            return self.module.draw_globals(n_samples)

    # -- summaries --------------------------------------------------------------------------------------------------

    def _draws(
        self, manager: AnnDataManager, rows: np.ndarray, questions: Sequence[Question], **options: Any
    ) -> Iterator[Draws]:
        return draw(
            self.module,
            manager,
            rows,
            questions,
            self.vocabulary,
            globals_=self._globals(manager, options["n_samples"], options["seed"]),
            size_factors=self._argument("size_factor_key") is not None,
            **options,
        )

    def _predict_cells(
        self,
        manager: AnnDataManager,
        rows: np.ndarray,
        questions: Sequence[Question],
        *,
        ci: float | None,
        **options: Any,
    ) -> dict[str, np.ndarray]:
        """Means (and interval ends) per cell; arrays ``(n_questions, n_cells, n_genes)``."""
        shape = (len(questions), len(rows), manager.adata.n_vars)
        out = {"mean": np.empty(shape, np.float32)}
        if ci is not None:
            out["low"], out["high"] = np.empty(shape, np.float32), np.empty(shape, np.float32)
        contexts = self._context_names(manager)
        latent = basal = None
        for d in self._draws(manager, rows, questions, **options):
            at = np.ix_(d.questions, d.cells)
            mean = d.expression.mean(0)
            out["mean"][at] = mean.cpu().numpy()
            if ci is not None:
                tails = torch.tensor([(1 - ci) / 2, (1 + ci) / 2], device=mean.device)
                low, high = torch.quantile(d.expression, tails, dim=0)
                wide = self._widening(
                    [questions[i] for i in d.questions], d.context, contexts, mean, options["scale"], ci
                )
                low, high = (
                    mean - ((mean - low) ** 2 + wide**2).sqrt(),
                    mean + ((high - mean) ** 2 + wide**2).sqrt(),
                )
                out["low"][at] = (low.clamp(min=0.0) if self.data_kind == "counts" else low).cpu().numpy()
                out["high"][at] = high.cpu().numpy()
            if latent is None:
                latent = np.empty((*shape[:2], d.latent.shape[-1]), np.float32)
                basal = np.empty((shape[1], d.basal.shape[-1]), np.float32)
            latent[at] = d.latent.mean(0).cpu().numpy()
            basal[d.cells] = d.basal.mean(0).cpu().numpy()
        return {**out, "latent": latent, "basal": basal}

    def _discrepancy(self, label: str, context: str, scale: str) -> tuple[float, float]:
        """A and k of the discrepancy between predicted and true effects; see `_calibration`."""
        calibration = self.calibration_
        if calibration is None or calibration["scale"] != scale or label == self.vocabulary.control:
            return 0.0, 0.0
        novelty = self.vocabulary.novelty(label)
        parts = [calibration["seen"]]
        if novelty in ("new combination", "unseen with features"):
            parts.append(calibration[novelty])
        if f"{label}|{context}" not in calibration["observed"] and context not in self._observed_contexts(
            label
        ):
            parts.append(calibration["new context"])
        # each step away from the data can only widen
        return max(p[0] for p in parts), max(p[1] for p in parts)

    def _observed_contexts(self, label: str) -> set[str]:
        """Contexts in which all members of a label were seen."""
        members = self.vocabulary.parse(label)
        seen = [
            {
                o.rpartition("|")[2]
                for o in self.calibration_["observed"]
                if m in self.vocabulary.parse(o.rpartition("|")[0])
            }
            for m in members
            if m in self.vocabulary.names
        ]
        return set.intersection(*seen) if seen else set(self.contexts)

    def _widening(
        self,
        questions: Sequence[Question],
        context: np.ndarray,
        names: Sequence[str],
        mean: torch.Tensor,
        scale: str,
        ci: float,
    ) -> torch.Tensor:
        """Half-widths that the discrepancy adds to a cell's interval, ``(n_questions, n_cells, 1)``-broadcastable."""
        z = stats.norm.ppf((1 + ci) / 2)
        table = np.array(
            [[self._discrepancy(q.label, names[c], scale) for c in range(len(names))] for q in questions],
            dtype=np.float32,
        )
        a, k = torch.as_tensor(table[:, context, 0]), torch.as_tensor(table[:, context, 1])
        # the size of a cell's effect is not known at this point: its predicted expression bounds it
        a, k = a.to(mean.device)[..., None], k.to(mean.device)[..., None]
        return z * (a**2 + (k * 0.25 * mean) ** 2).sqrt()

    def _effect_table(
        self,
        manager: AnnDataManager,
        rows: np.ndarray,
        questions: Sequence[Question],
        *,
        ci: float,
        delta: float,
        scale: str,
        n_samples: int,
        seed: int,
        batch_size: int | None,
    ) -> pd.DataFrame:
        options = {"n_samples": n_samples, "scale": scale, "seed": seed, "batch_size": batch_size}
        asked = [Question(self.vocabulary.control, ()), *questions]
        names = self._context_names(manager)
        codes = np.asarray(manager.adata.obs["_scvi_context"])[rows]
        present = np.unique(codes)
        total = torch.zeros(n_samples, len(asked), len(names), manager.adata.n_vars, dtype=torch.float64)
        for d in self._draws(manager, rows, asked, **options):
            x = d.expression.permute(2, 0, 1, 3).cpu().double()  # cells first
            sums = torch.zeros(len(names), *x.shape[1:], dtype=torch.float64)
            sums.index_add_(0, torch.as_tensor(d.context), x)
            total[:, d.questions] += sums.permute(1, 2, 0, 3)
        number = np.bincount(codes, minlength=len(names))[present]
        means = (total[:, :, present] / torch.as_tensor(number)[:, None]).numpy()
        control, perturbed = means[:, :1], means[:, 1:]
        effect = (perturbed - control).mean(0)
        spread = (perturbed - control).std(0, ddof=1) if n_samples > 1 else np.zeros_like(effect)
        z = stats.norm.ppf((1 + ci) / 2)
        genes = manager.adata.var_names.to_numpy(dtype=object)
        tables = []
        for q, question in enumerate(questions):
            for c, code in enumerate(present):
                a, k = self._discrepancy(question.label, names[code], scale)
                mean = effect[q, c]
                sd = np.sqrt(spread[q, c] ** 2 + a**2 + (k * mean) ** 2)
                safe = np.maximum(sd, 1e-9)
                before, after = control[:, 0, c].mean(0), perturbed[:, q, c].mean(0)
                columns = {
                    "perturbation": question.label,
                    "dose": question.dose_text,
                    "context": names[code],
                    "gene": genes,
                    "lfc_mean": mean,
                    "lfc_sd": sd,
                    "ci_low": mean - z * sd,
                    "ci_high": mean + z * sd,
                    "proba_de": stats.norm.sf((delta - mean) / safe) + stats.norm.cdf((-delta - mean) / safe),
                    "log2fc": _log2_fold_change(before, after, scale),
                    "mean_control": before,
                    "mean_perturbed": after,
                    "novelty": self.vocabulary.novelty(question.label),
                }
                if not self.vocabulary.has_dose:
                    columns.pop("dose")
                tables.append(pd.DataFrame(columns))
        return pd.concat(tables, ignore_index=True)

    # -- what calibration asks --------------------------------------------------------------------------------------

    def _mean_effects(
        self, rows: np.ndarray, conditions: Sequence[tuple[str, str]], scale: str, seed: int
    ) -> np.ndarray:
        """Predicted effects of ``(label, dose text)`` on the mean of the given own cells, ``(n_conditions, n_genes)``."""
        questions = [Question(self.vocabulary.control, ())]
        for label, dose in conditions:
            questions.append(
                Question(label, self._registered_dose(label, dose))
                if dose
                else self._questions(label, None)[0]
            )
        total = np.zeros((len(questions), self.adata.n_vars))
        for d in self._draws(
            self.adata_manager, rows, questions, n_samples=10, scale=scale, seed=seed, batch_size=None
        ):
            total[d.questions] += d.expression.mean(0).sum(1).cpu().double().numpy()
        return (total[1:] - total[:1]) / len(rows)

    def _registered_dose(self, label: str, text: str) -> tuple[float, ...]:
        from pertura.data._vocabulary import member_doses

        vocabulary = self.vocabulary
        doses = pd.Series([text] if "+" in text else [float(text)])
        values = member_doses(pd.Series([label]), doses, vocabulary.control, vocabulary.delimiter)[0]
        return tuple(float(v) for v in values[: len(vocabulary.parse(label))])

    def _moments(self, rows: np.ndarray, scale: str) -> tuple[np.ndarray, np.ndarray]:
        """Mean of own cells on a scale, and the squared standard error of that mean."""
        total = square = 0.0
        for cells in self._cells(self.adata_manager, rows, 512):
            factor = cells.library if self._argument("size_factor_key") is not None else None
            x = rescale(
                cells.x, "counts" if self.data_kind == "counts" else "layer", scale, cells.library, factor
            )
            x = x.cpu().double()
            total, square = total + x.sum(0), square + (x**2).sum(0)
        n = len(rows)
        mean = total / n
        variance = (square / n - mean**2).clamp(min=0.0) / max(n - 1, 1)
        return mean.numpy(), variance.numpy()

    # -- results ----------------------------------------------------------------------------------------------------

    @staticmethod
    def _targets(key: str, ci: float | None) -> dict[str, list[str]]:
        ends = [f"{key}_low", f"{key}_high"] if ci is not None else []
        return {"layers": [key, *ends], "obsm": [f"X_{key}", "X_basal"], "uns": [key, f"{key}_effect"]}

    def _write(
        self,
        user: AnnData,
        rows: np.ndarray,
        key: str,
        question: Question,
        result: Mapping[str, np.ndarray],
        table: pd.DataFrame,
        asked: dict[str, Any],
        written: dict[str, list[str]],
    ) -> None:
        genes = pd.Index(user.var_names.astype(str)).get_indexer(self.gene_names)
        for name in [n for n in ("mean", "low", "high") if n in result]:
            layer = np.full(user.shape, np.nan, np.float32)
            layer[np.ix_(rows, genes)] = result[name][0]
            user.layers[key if name == "mean" else f"{key}_{name}"] = layer
        for name, values in ((f"X_{key}", result["latent"][0]), ("X_basal", result["basal"])):
            matrix = np.full((user.n_obs, values.shape[1]), np.nan, np.float32)
            matrix[rows] = values
            user.obsm[name] = matrix
        context_key = self._argument("context_key")
        group = "context" if context_key is not None else "perturbation"
        params = {
            "groupby": context_key or self._argument("perturbation_key"),
            "reference": self.vocabulary.control,
            "method": f"pertura.{type(self).__name__}",
            "use_raw": False,
            "layer": key,
            "corr_method": "false sign rate",
        }
        user.uns[f"{key}_effect"] = ranked_effects(table, group, params)
        wrote = [f"{slot}/{name}" for slot, names in written.items() for name in names]
        user.uns[key] = provenance(self, wrote=wrote, **asked)

    def _as_anndata(
        self,
        user: AnnData,
        rows: np.ndarray,
        questions: Sequence[Question],
        result: Mapping[str, np.ndarray],
        asked: dict[str, Any],
    ) -> AnnData:
        n, genes = len(questions), self.gene_names
        obs = pd.concat([user.obs.iloc[rows]] * n)
        obs = obs[[c for c in obs.columns if not str(c).startswith(("_scvi", "_pertura"))]].copy()
        labels = np.repeat([q.label for q in questions], len(rows))
        key = self._argument("perturbation_key")
        key = "perturbation" if str(key).startswith("_pertura") else key
        if key in obs:
            obs[f"{key}_measured"] = obs[key].to_numpy()
        obs["cell"] = obs.index.to_numpy()
        obs["perturbation"] = pd.Categorical(labels)
        obs[key] = pd.Categorical(labels)
        if self.vocabulary.has_dose:
            obs["dose"] = np.repeat([q.dose_text for q in questions], len(rows))
            obs[self._argument("dose_key") if self._argument("dose_key") in obs else "dose"] = obs[
                "dose"
            ].to_numpy()
        obs["novelty"] = pd.Categorical(
            np.repeat([self.vocabulary.novelty(q.label) for q in questions], len(rows))
        )
        suffix = np.repeat(
            [f"-{q.label}" + (f"@{q.dose_text}" if self.vocabulary.has_dose else "") for q in questions],
            len(rows),
        )
        obs.index = obs.index.astype(str) + (suffix if n > 1 else "")
        flat = {k: v.reshape(-1, v.shape[-1]) for k, v in result.items() if k != "basal"}
        var = user.var.loc[user.var_names[pd.Index(user.var_names.astype(str)).get_indexer(genes)]].copy()
        out = AnnData(X=flat["mean"], obs=obs, var=var)
        for end in ("low", "high"):
            if end in flat:
                out.layers[end] = flat[end]
        out.obsm["X_latent"] = flat["latent"]
        out.obsm["X_basal"] = np.tile(result["basal"], (n, 1))
        out.uns[PROVENANCE_KEY] = provenance(self, wrote=[], **asked)
        return out


PROVENANCE_KEY = "prediction"


def _log2_fold_change(before: np.ndarray, after: np.ndarray, scale: str) -> np.ndarray:
    """As scanpy computes it from means of log1p values; on other than count scales the plain difference."""
    if scale == "log1p":
        return np.log2((np.expm1(after) + 1e-9) / (np.expm1(before) + 1e-9))
    if scale == "counts":
        return np.log2((after + 1e-9) / (before + 1e-9))
    return after - before
