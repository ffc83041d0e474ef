"""Perturb-seq from a known gene regulatory network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse
from sklearn.preprocessing import normalize

from pertura.datasets._simulate_settings import Settings
from pertura.datasets._simulate_truth import TARGET_SUM, expected_effects, lognormal_parameters
from pertura.datasets._simulate_world import World, draw_world

CHUNK_ENTRIES = 2_000_000  # cells x genes that are dense at one time


def simulate(
    *,
    n_cells_per_condition: int = 100,
    n_control_cells: int | None = None,
    n_genes: int = 200,
    n_regulators: int = 20,
    network_density: float = 0.1,
    network_gain: float = 0.9,
    acyclic: bool = True,
    perturbation_type: Literal["knockout", "activation", "drug"] = "knockout",
    n_perturbations: int = 10,
    effect_size: float = 1.5,
    n_targets: int | None = None,
    n_drug_classes: int = 0,
    combinations: int | Sequence[str | tuple[str, str]] = 0,
    interaction: float = 0.0,
    doses: Sequence[float] | None = None,
    hill: float = 1.0,
    n_contexts: int = 3,
    n_unresponsive_contexts: int = 1,
    n_biomarkers: int = 10,
    response_slope: float = 3.0,
    baseline_sd: float = 1.5,
    context_sd: float = 0.5,
    state_sd: float = 0.3,
    n_batches: int = 2,
    batch_sd: float = 0.1,
    frac_qc_failed: float = 0.0,
    n_artefact_genes: int = 10,
    artefact_size: float = 1.5,
    qc_library_factor: float = 0.4,
    modality: Literal["counts", "log"] = "counts",
    library_size: float = 2000.0,
    library_size_sd: float = 600.0,
    dispersion: float = 0.1,
    noise_sd: float = 0.2,
    paired: bool = False,
    n_truth_cells: int = 500,
    seed: int = 0,
    cell_seed: int | None = None,
) -> AnnData:
    r"""Simulate a perturbation screen whose network and effects are known.

    Every combination of perturbation, dose and context is measured; leave some out to hold them out. The rows
    come in random order.

    Parameters
    ----------
    n_cells_per_condition
        Cells per perturbation, dose and context.
    n_control_cells
        Control cells per context; None: four times `n_cells_per_condition`.
    n_genes, n_regulators
        Number of genes, and of those that may regulate others.
    network_density
        Probability of an edge from a regulator to a gene.
    network_gain
        Largest sum of absolute weights into a gene, below 1; weights are drawn from 0.5 to 1 times it.
    acyclic
        Whether regulators have an order in which each regulates only later ones.
    perturbation_type
        ``"knockout"`` lowers one regulator, ``"activation"`` raises one; the perturbation bears its name.
        ``"drug"`` shifts `n_targets` regulators, three of four times downwards.
    n_perturbations
        Number of single perturbations; at most `n_regulators` unless they are drugs.
    effect_size
        Mean absolute shift of a target's log-rate at saturating dose (1.5: down to 22 %).
    n_targets
        Targets per drug (or drug class); None: three.
    n_drug_classes
        Zero: drugs are unrelated. Otherwise drugs of a class share their targets, but for potency and a weak
        off-target, and `uns["drugs"]` describes each in words.
    combinations
        Pairs to simulate: how many, or which (``"A+B"`` or ``("A", "B")``, names as in `obs`). Both members
        have the dose in `obs`.
    interaction
        Zero: log-rate shifts add up. Otherwise each pair also shifts one more regulator, by `interaction`
        times `effect_size`.
    doses
        Doses of every perturbation, zero allowed; None: no dose, full effect.
    hill
        Exponent of the dose response. The EC50 of a perturbation is within half a decade of the doses'
        middle.
    n_contexts, n_unresponsive_contexts
        Number of contexts (`obs["cell_type"]`), and of the last ones among them that hardly respond.
    n_biomarkers
        Genes whose expression in control foretells the response of a context; zero: nothing does.
    response_slope
        Steepness of the response factor. At 3 it is 0.82 to 0.99 in responsive contexts, 0.01 to 0.18 in
        others.
    baseline_sd, context_sd, state_sd
        Standard deviations of log-rates between genes, between contexts, and between cells of a context (the
        last before it spreads through the network).
    n_batches, batch_sd
        Number of batches and the standard deviation of their shifts. Batches are independent of all else.
    frac_qc_failed
        Share of cells that fail quality control.
    n_artefact_genes, artefact_size, qc_library_factor
        What failing cells show: `n_artefact_genes` genes (``MT-…``) raised by about `artefact_size` on the
        log scale, and a library size of `qc_library_factor` times what it were.
    modality
        ``"counts"``: single cells. ``"log"``: bulk-like profiles on the log scale with Gaussian noise; the
        options on library size and dispersion play no part then.
    library_size, library_size_sd
        Mean and standard deviation of the lognormal library size.
    dispersion
        :math:`\alpha` of the negative binomial, whose variance is :math:`\mu + \alpha \mu^2`.
    noise_sd
        Standard deviation of the measurement noise of ``modality="log"``.
    paired
        Whether each perturbed cell shares basal state and batch with the control cell of the same
        `obs["pair"]`, as pre- and post-treatment samples do.
    n_truth_cells
        Cells over which the expected effects are averaged; `true_effects(adata, kind="effect_se")` has the
        error.
    seed
        Seed of network, effects and cells.
    cell_seed
        Other values draw other cells from the same network and effects.

    Returns
    -------
    AnnData, cells x genes, float32:

    - `X`: log1p of counts per 10,000, CSR (``modality="log"``: log expression, dense);
    - `layers["counts"]`: counts, CSR (``modality="counts"``);
    - `obs`: `perturbation` (``"control"`` or a name or ``"A+B"``), `dose` (with `doses`; 0 in control),
      `cell_type`, `batch`, `qc_pass`, `pair` (if `paired`), `library_size` (expected) and `total_counts`;
    - `var`: `is_regulator`, `is_biomarker`, `is_artefact`, `is_perturbed`;
    - `varp["true_grn"]`: signed weights, CSR, ``[source, target]``;
    - `uns["drugs"]`: `drug_class` and `description` (drugs with classes), known to an experimenter;
    - `uns["truth"]`: `conditions` (table) with `effect`, `effect_se` and `log_rate_shift` (conditions x
      genes); `control_mean` and `context_baseline` (contexts x genes, on the scale of `X` and as log-rates);
      `contexts` (`biomarker_activity`, `response_factor`); `perturbations` (`ec50`, `hill`); `targets` and
      `interactions` (direct shifts); `drug_class`; `batch_shift`; `artefact_shift`; `genes`; `settings`
      (without those that are None).

    Raises
    ------
    ValueError
        If an argument is out of range or contradicts another; the message names it.

    See Also
    --------
    true_effects, true_network : read `uns["truth"]` and `varp["true_grn"]` as tables.

    Notes
    -----
    With regulators r, genes g, weights :math:`A_{rg}` and total effects :math:`T = (I - A)^{-1}`, a cell i of
    context c and batch b under perturbations p at dose u has

    .. math::

        x_i &= z_i T, \quad z_{ig} \sim N(0, \mathtt{state\_sd}^2) \\
        h_p(u) &= u^n / (u^n + \mathrm{EC50}_p^n) \\
        \Delta_i &= \Big( \sum_p h_p(u)\, \delta_p + \prod_p h_p(u)\, \gamma_{\{p\}} \Big) T \\
        r_c &= \mathrm{sigmoid}(\mathtt{response\_slope} \cdot a_c) \\
        \eta_i &= \mathrm{baseline}_c + x_i + r_c \Delta_i + \beta_b + [\mathrm{failed}]\, \tau \\
        \mu_i &= \ell_i\, \mathrm{softmax}(\eta_i), \quad \ell_i \sim \mathrm{lognormal} \\
        y_{ig} &\sim \mathrm{NB}(\mu_{ig}, \alpha)

    (``modality="log"``: :math:`y_i \sim N(\eta_i, \mathtt{noise\_sd}^2)`). The direct shifts :math:`\delta_p`
    and the interactions :math:`\gamma` live on regulators. The biomarker activity :math:`a_c` is the amount
    by which the biomarkers' log-rates in context c exceed their common baseline: from 0.5 to 1.5 in
    responsive contexts, from -1.5 to -0.5 in others. Perturbations shift, they do not cut off the regulator's
    own inputs, so that log-rate shifts of combinations add up.

    The *true effect* is the expected mean of `X` under the perturbation minus that of controls of the same
    context, over cells that pass QC and all that is random in them.

    Examples
    --------
    >>> import pertura as pr
    >>> adata = pr.datasets.simulate(n_cells_per_condition=20, combinations=2)
    >>> effects = pr.datasets.true_effects(adata)
    >>> network = pr.datasets.true_network(adata)
    """
    settings = Settings(**locals())
    cell_seeds, truth_seeds = np.random.SeedSequence([seed, 1]).spawn(2)
    if cell_seed is not None:
        cell_seeds = np.random.SeedSequence([seed, 2, cell_seed])
    world = draw_world(settings)
    obs, codes, state = _plan_cells(settings, world, np.random.default_rng(cell_seeds.spawn(1)[0]))
    rng = np.random.default_rng(cell_seeds)
    profiles = _draw_profiles(settings, world, obs, codes, state, rng)

    adata = AnnData(obs=obs, var=world.genes, varp={"true_grn": world.network_matrix})
    if settings.modality == "counts":
        adata.obs["total_counts"] = np.asarray(profiles.sum(axis=1), dtype=np.float32).ravel()
        adata.layers["counts"] = profiles
        normalised = normalize(profiles, norm="l1")
        normalised.data = np.log1p(TARGET_SUM * normalised.data)
        adata.X = normalised
    else:
        adata.X = profiles
    adata.uns["truth"] = _record(settings, world, truth_seeds)
    adata.uns["dataset"] = {
        "name": "simulated",
        "citation": "pertura.datasets.simulate",
        "licence": "none: synthetic data",
    }
    if world.drugs is not None:
        adata.uns["drugs"] = world.drugs
    return adata


def _plan_cells(
    s: Settings, world: World, rng: np.random.Generator
) -> tuple[pd.DataFrame, dict[str, np.ndarray], np.ndarray | None]:
    """Lay out the cells: obs, codes of condition, context, batch and pair, innovations that pairs share."""
    n, n_conditions = s.n_cells_per_condition, len(world.conditions)
    n_control = s.n_control_cells or 4 * n
    sizes = np.r_[n_control, np.full(n_conditions - 1, n)]
    condition = np.tile(np.repeat(np.arange(n_conditions), sizes), s.n_contexts)
    context = np.repeat(np.arange(s.n_contexts), sizes.sum())
    replicate = np.tile(np.concatenate([np.arange(size) for size in sizes]), s.n_contexts)
    order = rng.permutation(len(condition))
    condition, context, replicate = condition[order], context[order], replicate[order]
    batch = rng.integers(s.n_batches, size=len(order))
    state, pair = None, context * n_control + replicate % n_control
    if s.paired:
        batch = rng.integers(s.n_batches, size=s.n_contexts * n_control)[pair]
        state = rng.standard_normal((s.n_contexts * n_control, s.n_genes), dtype=np.float32)

    table = world.conditions.iloc[condition].reset_index(drop=True)
    obs = pd.DataFrame(index=pd.RangeIndex(len(order)).astype(str))
    obs["perturbation"] = pd.Categorical(table["perturbation"], categories=world.conditions["perturbation"].unique())
    if s.doses is not None:
        obs["dose"] = table["dose"].to_numpy()
    obs["cell_type"] = pd.Categorical.from_codes(context, world.contexts.index)
    obs["batch"] = pd.Categorical.from_codes(batch, [f"batch_{b + 1}" for b in range(s.n_batches)])
    obs["qc_pass"] = rng.random(len(order)) >= s.frac_qc_failed
    if s.paired:
        obs["pair"] = pd.Categorical.from_codes(pair, [f"pair_{i}" for i in range(len(state))])
    if s.modality == "counts":
        location, scale = lognormal_parameters(s.library_size, s.library_size_sd)
        depth = rng.lognormal(location, scale, len(order))
        obs["library_size"] = depth * np.where(obs["qc_pass"], 1.0, s.qc_library_factor)
    return obs, {"condition": condition, "context": context, "batch": batch, "pair": pair}, state


def _draw_profiles(
    s: Settings,
    world: World,
    obs: pd.DataFrame,
    codes: dict[str, np.ndarray],
    state: np.ndarray | None,
    rng: np.random.Generator,
) -> sparse.csr_matrix | np.ndarray:
    """Draw counts (CSR) or log expression (dense), chunk by chunk, so that the dense rates stay small."""
    baseline, shift, batch_shift, artefact_shift, propagation, factor = (
        np.asarray(values, dtype=np.float32)
        for values in (
            world.baseline,
            world.shift,
            world.batch_shift,
            world.artefact_shift,
            world.propagation,
            world.contexts["response_factor"],
        )
    )
    failed = ~obs["qc_pass"].to_numpy()
    chunks = []
    size = max(1, CHUNK_ENTRIES // s.n_genes)
    for start in range(0, len(obs), size):
        rows = slice(start, start + size)
        condition, context, batch = (codes[name][rows] for name in ("condition", "context", "batch"))
        shape = (len(condition), s.n_genes)
        z = rng.standard_normal(shape, dtype=np.float32) if state is None else state[codes["pair"][rows]]
        z *= np.float32(s.state_sd)
        log_rate = z + z[:, world.regulators] @ propagation
        log_rate += baseline[context] + batch_shift[batch]
        log_rate += shift[condition] * factor[context][:, None]
        log_rate[failed[rows]] += artefact_shift
        if s.modality == "log":
            chunks.append(log_rate + np.float32(s.noise_sd) * rng.standard_normal(shape, dtype=np.float32))
            continue
        rate = np.exp(log_rate - log_rate.max(axis=1, keepdims=True))
        rate *= (obs["library_size"].to_numpy()[rows] / rate.sum(axis=1, dtype=float))[:, None]
        if s.dispersion > 0:
            rate *= rng.standard_gamma(1 / s.dispersion, shape, dtype=np.float32) * np.float32(s.dispersion)
        chunks.append(sparse.csr_matrix(rng.poisson(rate).astype(np.float32)))
    return sparse.vstack(chunks, format="csr") if s.modality == "counts" else np.concatenate(chunks)


def _record(s: Settings, world: World, seeds: np.random.SeedSequence) -> dict[str, Any]:
    """Truth in a form that an h5ad file can hold."""
    conditions = world.conditions.iloc[np.repeat(np.arange(1, len(world.conditions)), s.n_contexts)]
    conditions = conditions.reset_index(drop=True)
    conditions["cell_type"] = np.tile(world.contexts.index.to_numpy(dtype=object), len(world.conditions) - 1)
    conditions.index = conditions.index.astype(str)
    shift = world.shift[1:, None, :] * world.contexts["response_factor"].to_numpy()[None, :, None]
    arrays = {
        "log_rate_shift": shift.reshape(-1, s.n_genes),
        "context_baseline": world.baseline,
        "batch_shift": world.batch_shift,
        "artefact_shift": world.artefact_shift,
        **expected_effects(s, world, seeds),
    }
    truth = {name: np.asarray(values, dtype=np.float32) for name, values in arrays.items()}
    truth |= {
        "conditions": conditions,
        "contexts": world.contexts,
        "perturbations": world.perturbations,
        "targets": world.targets,
        "interactions": world.interactions,
        "genes": world.genes.index.to_numpy(dtype=object),
        "scale": "log1p of counts per 10,000" if s.modality == "counts" else "log expression",
        "settings": s.storable(),
    }
    if world.drugs is not None:
        truth["drug_class"] = world.drugs["drug_class"].to_dict()
    return truth
