"""PertVAE for users."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from numpy.typing import NDArray

from pertura.data._constants import KEYS
from pertura.data._datamodule import PerturbationDataModule
from pertura.data._pairs import Coupling, Strata, embed, explicit_coupling, random_coupling, strata, transport_coupling
from pertura.data._validation import check_obs_key
from pertura.effects import ConditionTable, share_of_differences
from pertura.effects._discrepancy import perturbations_of
from pertura.effects._sums import codes_of, control_means, project
from pertura.effects._table import halves
from pertura.module._draws import run
from pertura.module._pertvae import PertVAE as Module
from pertura.train._elbo import FreeBitsELBO

from .base import PerturbationModel, TrainingOptions, option
from .base._departures import ContextEffects, Without
from .base._gene_effects import dose_response
from .base._model import SetupKey
from .base._predict import device_of, seeded
from .base._query import Query

logger = logging.getLogger(__name__)

_MAX_CELLS, _MAX_CONDITIONS = 200, 3000  # of a condition, and in all, from which left-out contexts are predicted
_COMMON = 100.0  # prior variance of what perturbations have in common


@dataclass(frozen=True)
class PertVAEOptions(TrainingOptions):
    """Options of :class:`PertVAE`, which has their documentation."""

    n_latent: int = option(30, whole=1)
    encoder_hidden: tuple[int, ...] = option((128, 128), widths=True)
    decoder_hidden: tuple[int, ...] = option((), widths=True)
    n_flow_context: int = option(64, whole=1)
    n_flow_steps: int = option(2, whole=0)
    n_flow_hidden: int = option(64, whole=1)
    rank: int | None = option(None, whole=1)
    effect_input: Literal["cell", "context"] | None = option(None, one_of=("cell", "context"))
    transition_noise: Literal["constant", "state"] = option("constant", one_of=("constant", "state"))
    pairing: Literal["pairs", "random", "ot"] | None = option(None, one_of=("pairs", "random", "ot"))
    singletons: bool = option(True, flag=True)
    likelihood: Literal["nb", "normal"] | None = option(None, one_of=("nb", "normal"))
    link_sharpness: float = option(3.0, above=0)
    heteroscedastic: bool = option(False, flag=True)
    prior_sd_W: float | None = option(None, above=0)
    prior_sd_b: float | None = option(None, above=0)
    free_nats: float = option(0.0, least=0)
    effects: Literal["measured", "latent"] = option("measured", one_of=("measured", "latent"))
    use_weight_norm: bool = option(False, flag=True)
    effect_lr_factor: float = option(5.0, above=0)
    lr: float = option(5e-3, above=0)
    weight_decay: float = option(1e-4, least=0)
    n_steps: int = option(1000, whole=1)


PAPER = {
    "n_latent": 100,
    "encoder_hidden": (500, 300),
    "decoder_hidden": (300, 500),
    "n_flow_context": 200,
    "n_flow_steps": 2,
    "n_flow_hidden": 300,
    "rank": 100,
    "effect_input": "cell",
    "transition_noise": "state",
    "link_sharpness": 1.0,
    "heteroscedastic": True,
    "prior_sd_W": 1.0,
    "effects": "latent",
    "free_nats": 2.0,
    "use_weight_norm": True,
    "effect_lr_factor": 1.0,
    "lr": 5e-4,
    "lr_schedule": "constant",
    "weight_decay": 0.0,
    "kl_warmup": 0.0,
    "n_steps": 10_000,
}
_MODULE_OPTIONS = (
    "n_latent",
    "encoder_hidden",
    "decoder_hidden",
    "n_flow_context",
    "n_flow_steps",
    "n_flow_hidden",
    "transition_noise",
    "link_sharpness",
    "heteroscedastic",
    "use_weight_norm",
    "effect_lr_factor",
)


def _check_pairs(adata: AnnData, args: dict[str, Any]) -> None:
    """Raise unless the column is there and some control and perturbed cell share a value."""
    pair_key, perturbation_key = args["pair_key"], args["perturbation_key"]
    check_obs_key(adata, "pair_key", pair_key)
    is_control = (adata.obs[perturbation_key].astype(str) == args["control"]).to_numpy()
    pair = adata.obs[pair_key]
    shared = pd.Index(pair[is_control].dropna()).intersection(pd.Index(pair[~is_control].dropna()))
    if is_control.any() and not len(shared):
        raise ValueError(
            f"`pair_key`: no value of `adata.obs[{pair_key!r}]` is shared by a control and a perturbed cell. "
            "Give the members of a pair the same identifier; cells without a partner may have none."
        )


class PertVAE(PerturbationModel):
    """Perturbation variational autoencoder :cite:p:`Rampasek2019`.

    A perturbation moves the latent state of a cell linearly, :math:`z_2 = z_1 + W z_1 + b`. Pairs of cells before and after
    it teach the effect. Singletons, cells without a partner (such as the controls of a cell type that was never treated),
    teach the latent space. One model holds any number of perturbations, their doses and combinations.

    Means of predictions follow the mean of :math:`z_2`. Draws of single cells, and with them the intervals, also have the noise
    of :math:`z_2` given :math:`z_1`.

    Parameters
    ----------
    adata
        Set up by :meth:`setup_anndata`; `None` to make a model of a `registry` alone.
    registry
        Registry of a saved model.
    n_latent
        Dimension of the latent state.
    encoder_hidden, decoder_hidden
        Widths of the layers. Without decoder layers (the default) log-expression is linear in the latent state, so that an
        effect learned in one context carries over to another.
    n_flow_context, n_flow_steps, n_flow_hidden
        Inverse autoregressive flow of the guide: context units, steps, hidden units of a step.
    rank
        Rank of W per perturbation. `None`: full for one perturbation and 4 for several.
    effect_input
        ``"context"``: W multiplies the mean basal state of the cell's context, so that noise between cells that are not truly
        paired does not dilute it; ``"cell"``: the cell's own state, as in the paper. `None`: ``"cell"`` where ``pair_key``
        was registered, else ``"context"``.
    transition_noise
        Standard deviation of :math:`z_2` given :math:`z_1`: ``"constant"``, one per dimension, or ``"state"``, log-linear in
        :math:`z_1`.
    pairing
        Partner of a perturbed cell: ``"pairs"`` (registered ``pair_key``), ``"random"`` control of its context and batch, newly
        drawn each epoch, or ``"ot"``, drawn from an optimal-transport coupling with them. `None`: ``"pairs"`` where registered,
        else ``"ot"``.
    singletons
        Whether cells without a partner take part in training.
    likelihood
        ``"nb"`` for counts, ``"normal"`` for others; `None` takes what fits the registered layer.
    link_sharpness
        See :class:`pertura.nn.CountLikelihood`.
    heteroscedastic
        Whether the noise of a Gaussian likelihood depends on the state; see :class:`pertura.nn.GaussianLikelihood`.
    prior_sd_W, prior_sd_b
        Standard deviations of the normal priors of W and b: the L2 penalty. `None`: 0.3 and 10 for one perturbation; 0.1 and
        0.3 for several, whose b is then shrunk toward what they have in common.
    free_nats
        Divergence per latent variable (z1, z2) and cell that costs nothing.
    effects
        ``"measured"``: left-out training contexts decide what share of W is kept (:attr:`share`), and in a context where a
        perturbation was measured its effect is the measured one, drawn toward what other contexts say of it as far as its cells are
        few. ``"latent"``: effects are those of W and b as trained, as in the paper, and so are those of perturbations of a single context.
    use_weight_norm
        Whether all layers are weight-normalized.
    effect_lr_factor
        Learning rate of effects in units of that of the neural networks.
    lr, lr_schedule
        Learning rate, and whether it falls to zero along a cosine or stays.
    weight_decay
        Decoupled weight decay of the matrices of encoder and decoder.
    kl_warmup
        Share of the epochs in which the weight of divergences rises to 1; 0: none.
    n_steps, n_epochs
        Length of training where ``train`` is given no number of epochs: at least so many steps and so many epochs.
    preset
        ``"paper"``: settings of the paper (encoder 500-300 with the mean and scale of the guide beside 200 units that feed its
        flow, latent 100, two flow steps of 300 units, decoder 300-500, weight normalization, W of the cell's own state, Adam at a
        constant rate, no warm-up). Options given beside it win. The paper stops on the prediction loss of validation pairs:
        ``train(early_stopping=True)`` stops on the error of predicted effects of validation cells. The rate and the number of steps,
        which the paper does not give, are choices; one model holds all perturbations, the paper has one model for
        each; the norms of weight normalization in the flow count masked weights, too.

    Examples
    --------
    >>> pertura.model.PertVAE.setup_anndata(adata, perturbation_key="condition", control="ctrl", layer="counts")
    >>> model = pertura.model.PertVAE(adata)
    >>> model.train()
    >>> model.predict_perturbation("stim", key_added="stim")
    """

    _module_cls = Module
    _options_cls = PertVAEOptions
    _presets: ClassVar[dict[str, dict[str, Any]]] = {"paper": PAPER}
    _setup_keys = (
        SetupKey(
            "pair_key",
            "Column of ``obs`` with an identifier that a perturbed cell shares with its control(s).",
            _check_pairs,
        ),
    )
    _can_predict_features = True

    def _make_module(self) -> None:
        options, vocabulary, features = self.options, self.vocabulary, self.vocabulary.features
        paired, several = self.registered.argument("pair_key") is not None, vocabulary.n_perturbations > 1
        if self.pairing == "pairs" and not paired:
            raise ValueError("`pairing='pairs'` needs `pair_key` in `setup_anndata`.")
        likelihood = self._likelihood(options.likelihood)
        self.module = Module(
            len(self.gene_names),
            vocabulary.n_perturbations,
            len(self.contexts),
            len(self.registered.batches),
            effect_input=options.effect_input or ("cell" if paired else "context"),
            rank=options.rank or (4 if several else None),
            # each one's own part of several is small a priori beside what is common or what features explain
            prior_sd_W=options.prior_sd_W or (0.1 if several else 0.3),
            prior_sd_b=options.prior_sd_b or (0.3 if several else 10.0),
            likelihood=likelihood,
            n_features=0 if features is None else features.shape[1],
            **{name: getattr(options, name) for name in _MODULE_OPTIONS},
        )
        if features is not None:
            self.module.features.copy_(torch.as_tensor(vocabulary.feature_matrix(vocabulary.names)))
        self._model_summary_string = (
            f"PertVAE: {vocabulary.n_perturbations} perturbations, {len(self.contexts)} contexts, "
            f"latent {options.n_latent}, {likelihood} likelihood, pairing {self.pairing}"
        )

    @property
    def pairing(self) -> str:
        """How partners are found: ``"pairs"``, ``"random"`` or ``"ot"``."""
        return self.options.pairing or ("ot" if self.registered.argument("pair_key") is None else "pairs")

    # -- training ---------------------------------------------------------------------------------------------------

    def _data_module(self, train_idx: NDArray, val_idx: NDArray, batch_size: int, seed: int) -> PerturbationDataModule:
        train = self._coupling(train_idx)
        if not len(train.treated):
            raise ValueError(
                "`adata`: no perturbed training cell has a control to compare with. "
                "Every context (or pair) needs control cells; check `context_key` and `pair_key`."
            )
        alone = int((~self._registered_cells(train_idx).is_control).sum()) - len(train.treated)
        if alone and self.pairing != "pairs":
            logger.warning(
                "%d perturbed cells are in contexts without control cells: they train the latent space, not the effect.",
                alone,
            )
        return PerturbationDataModule(
            self.adata_manager,
            train_idx,
            val_idx,
            train_coupling=train,
            val_coupling=self._coupling(val_idx) if len(val_idx) else None,
            batch_size=batch_size,
            singletons=self.options.singletons,
            seed=seed,
        )

    def _coupling(self, rows: NDArray) -> Coupling:
        """Registered pairs, or random ones."""
        cells = self._registered_cells(rows)
        if self.pairing == "pairs":
            pair = self.adata.obs[self.registered.argument("pair_key")].to_numpy(object)[rows]
            return explicit_coupling(rows, cells.is_control, pair)
        return random_coupling(rows, cells.is_control, self._strata(cells))

    def _transport(self, data: PerturbationDataModule, rows: NDArray, axes: NDArray) -> Coupling:
        """Pairs by optimal transport along some axes of expression."""
        cells = self._registered_cells(rows)
        _, perturbation = cells.done(self.vocabulary)
        embedding, rng = project(data.dataset, rows, axes), np.random.default_rng(data.seed)
        return transport_coupling(rows, cells.is_control, self._strata(cells), perturbation, embedding, rng)

    def _strata(self, cells: Query) -> Strata:
        """Contexts and batches, in which cells find controls."""
        batch = np.asarray(cells.manager.adata.obs[f"_scvi_{KEYS.BATCH}"])[cells.rows]
        where = pd.DataFrame({"context": cells.context, "batch": batch})
        return strata(where, cells.is_control, ["context", "batch"])

    def _initialize(self, data: PerturbationDataModule, table: ConditionTable) -> None:
        self.module.departures.clear()
        self.module.share.fill_(1.0)
        n_components = self.module.profile_basis.shape[1]
        _, axes = embed(table.sample.x, False, n_components, seed=data.seed, return_basis=True)
        if not self.is_trained_:
            self._standardize(data, table)
            self._describe_contexts(table, axes)
        if self.module.effect_input == "context":
            cells = self._registered_cells(data.train_idx)
            controls = cells.at(cells.rows[cells.is_control])
            batch = codes_of(data.dataset, KEYS.BATCH, controls.rows)
            half = np.zeros((len(data.dataset), 1), dtype=np.float32)
            half[controls.rows, 0] = halves(self.adata_manager, controls.rows, controls.context, batch)
            data.dataset.fields["half"] = half
        if self.pairing == "ot":
            parts = [
                self._transport(data, rows, axes) if len(rows) else None for rows in (data.train_idx, data.val_idx)
            ]
            data.pair(*parts)

    @torch.no_grad()
    def _describe_contexts(self, table: ConditionTable, axes: NDArray) -> None:
        """Where the mean control profile of each context lies on the principal axes of the training cells.

        Centered at the average context that has both arms, and in units of the spread of those contexts: the prior of W is then
        in latent units per typical difference between contexts, and b is the effect in the average context.
        """
        module, found, profiles = self.module, table.has_control, table.controls
        both = np.isin(np.arange(table.n_contexts), table.context[table.treated]) & found
        if not both.any():  # pairs were registered across contexts
            both = found
        center = profiles[both].mean(0)
        spread = np.sqrt(np.square((profiles[both] - center) @ axes.T).sum(1).mean())
        module.profile_mean.copy_(torch.as_tensor(center))
        module.profile_basis.zero_()
        if spread > 1e-6:
            module.profile_basis[:, : len(axes)] = torch.as_tensor(axes.T / spread)
        module.context_profile.copy_(self._projected(profiles, found))
        module.half_profile.copy_(torch.cat([self._projected(part, found) for part in table.control_halves]))

    @torch.no_grad()
    def _complete(self, table: ConditionTable) -> None:
        """Keep the share of W that left-out contexts support, and add what effects in single contexts differ from the model's."""
        if self.options.effects == "latent":
            return
        contexts = ContextEffects(self, table)
        if not len(contexts):
            return
        if self.module.effect_input == "context":
            expected = self._from_other_contexts(contexts, _LeftOut(self, table))
        else:  # W of the cells' own states is not learned from contexts
            expected = contexts.predict()
        contexts.set_departures(self.module.departures, expected)

    def _from_other_contexts(self, contexts: ContextEffects, left_out: _LeftOut) -> NDArray:
        """Effects of conditions as W and b of other contexts predict them, with the share of W that these predictions support."""
        expected = contexts.predict(left_out.without(0.0))
        rows = contexts.rows[contexts.number[contexts.rows] > 2]
        if not len(rows):
            return expected
        # the noise of the controls of a profile would be in the effect, too
        effects, noise = contexts.against_other_half()
        further = [contexts.predict(left_out.without(1.0, p)) - expected for p in self.module.half_profile.chunk(2)]
        target, predicted = (
            np.concatenate([part[rows] for part in both]) for both in ([e - expected for e in effects], further)
        )
        share = share_of_differences(target, predicted, np.tile(noise[rows], 2))
        self.module.effect_U.mul_(share)
        self.module.share.fill_(share)
        return expected + share * np.mean(further, axis=0)

    @property
    def _draws_effects(self) -> bool:
        return len(self.module.departures) > 0

    @property
    def share(self) -> float:
        """Share of W that is kept, 1 where nothing says how much.

        The one with which training contexts are predicted best from the others. 0 where their effects differ by hardly more than
        chance: those of a new context are then the mean effect, on its own starting point.
        """
        self._check_if_trained(warn=False, message="The model is not trained. Call `train()` first.")
        return float(self.module.share)

    def _projected(self, profiles: NDArray, found: NDArray) -> torch.Tensor:
        device = device_of(self.module)
        tensors = (torch.as_tensor(profiles, dtype=torch.float32), torch.as_tensor(found))
        return self.module.project_profiles(*(tensor.to(device) for tensor in tensors))

    def _plan_defaults(self) -> dict[str, Any]:
        options = self.options
        return {
            **super()._plan_defaults(),
            "loss_fn": FreeBitsELBO({"z1": options.free_nats, "z2": options.free_nats}),
            "weight_decay": options.weight_decay,
        }

    # -- prediction -------------------------------------------------------------------------------------------------

    def _learn_from_query(self, asked: Query) -> dict[str, Any]:
        """Control profiles of the query's contexts: those of new contexts come from the query's own control cells."""
        known = self.module.context_profile
        new = np.arange(len(known), len(asked.contexts))
        if self.module.effect_input == "cell" or not len(new):
            return {}
        found, profiles = control_means(asked.manager, new)
        return {"context_profile": torch.cat([known, self._projected(profiles, found)])}


class _LeftOut:
    """What W and b would be without some contexts: their posterior mean in closed form, given latent states.

    A condition's mean latent state less that of its controls is linear in W and b. Their priors are those of the module; features
    of perturbations explain what they do in the trained module. W is that of profiles of contexts.
    """

    def __init__(self, model: PertVAE, table: ConditionTable) -> None:
        self.module, self.context = model.module, table.context[table.treated]
        state, n = self._states(model, table)
        treated = table.treated
        control = np.zeros((table.n_contexts, state.shape[1]))
        control[table.context[table.is_control]] = state[table.is_control]
        codes = np.where(table.codes[treated] >= 0, table.codes[treated], -1)
        strength = dose_response(model)(codes, table.dose[treated]) * (codes >= 0)
        self.amount = np.zeros((len(treated), model.vocabulary.n_perturbations))
        np.add.at(self.amount, (np.arange(len(treated))[:, None], codes.clip(0)), strength)
        effect = state[treated] - control[self.context]
        if self.module.effect_features is not None:
            effect -= self.amount @ self.module.effect_features(self.module.features).cpu().numpy()
        self.effect = effect
        usable = np.isin(self.context, table.context[table.is_control]) & (n[treated] > 0)
        # many more than these do not sharpen what is learned
        self.usable = np.flatnonzero(usable)[np.argsort(-n[treated][usable], kind="stable")[:_MAX_CONDITIONS]]
        self.noise = float(self.module.mean_noise_variance().mean().detach()) / np.maximum(table.n[treated].sum(1), 1)

    def _states(self, model: PertVAE, table: ConditionTable) -> tuple[NDArray, NDArray]:
        """Mean latent state of some cells of each condition, ``(n_conditions, n_latent)``, and their number."""
        cells, module = model._registered_cells(model.train_indices), self.module
        done, which = cells.done(model.vocabulary)
        treated = list(zip(perturbations_of(table, model.vocabulary), self.context, table.treated, strict=True))
        row = {(p.label, p.dose, c): i for p, c, i in treated}
        row |= {(None, None, table.context[i]): i for i in np.flatnonzero(table.is_control)}
        control = cells.is_control
        keys, key = np.unique(np.stack([np.where(control, -1, which), cells.context]), axis=1, return_inverse=True)
        names = [(None, None) if w < 0 else (done[w].label, done[w].dose) for w in keys[0]]  # None: controls
        at = np.array([row.get((*name, c), -1) for name, c in zip(names, keys[1], strict=True)])[key.ravel()]
        shuffled = np.random.default_rng(0).permutation(np.flatnonzero(at >= 0))
        rank = pd.Series(at[shuffled]).groupby(at[shuffled]).cumcount().to_numpy()
        kept = np.sort(shuffled[rank < _MAX_CELLS])
        state = np.zeros((len(table.codes), module.n_latent))
        start = 0
        with seeded(0, device_of(module)):
            for part in cells.at(cells.rows[kept]).cells(512, device_of(module)):
                z = run(module.guide, part, 2).nodes["z1"]["value"].mean(0).double().cpu().numpy()
                np.add.at(state, at[kept[start : start + len(part)]], z)
                start += len(part)
        n = np.bincount(at[kept], minlength=len(state))
        return state / np.maximum(n, 1)[:, None], n

    def without(self, share: float, profiles: torch.Tensor | None = None) -> Without:
        """The module with a share of W, and both learned from the other contexts than those of a fold.

        Parameters
        ----------
        share
            Of W.
        profiles
            What the contexts that are predicted are described by, if not by all their controls.
        """
        module, names = self.module, ("effect_U", "effect_V", "effect_b", "context_profile")

        @contextmanager
        def inner(fold: NDArray) -> Iterator[None]:
            at = self.usable[~np.isin(self.context[self.usable], fold)]
            amount, total = self.amount[at], self.amount[at].sum(1)
            u = module.context_profile.double().cpu().numpy()[self.context[at]]
            alike = amount @ amount.T
            common = _COMMON * (module.effect_common is not None)
            covariance = module.prior_sd_b**2 * alike + common * np.outer(total, total) + np.diag(self.noise[at])
            covariance += module.prior_sd_W**2 * alike * (u @ u.T)
            weight = np.linalg.solve(covariance, self.effect[at])
            b = module.prior_sd_b**2 * amount.T @ weight + common * (total @ weight)
            kept = {name: getattr(module, name) for name in names}
            try:
                own = kept["effect_b"]
                b = torch.as_tensor(b, dtype=own.dtype, device=own.device)
                module.effect_b = torch.nn.Parameter(b if module.effect_common is None else b - module.effect_common)
                W = np.einsum("cp,ci,cj->pij", amount, weight, u, optimize=True) * module.prior_sd_W**2 * share
                module.effect_U = torch.nn.Parameter(torch.as_tensor(W, dtype=own.dtype, device=own.device))
                module.effect_V = None
                if profiles is not None:
                    module.context_profile = profiles
                yield
            finally:
                for name, value in kept.items():
                    setattr(module, name, value)

        return inner
