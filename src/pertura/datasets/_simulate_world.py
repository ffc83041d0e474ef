"""What a simulation plants: network, contexts, perturbation effects, technical shifts.

Everything here is drawn once per simulation and known afterwards; cells are drawn in `_simulate`,
expectations over cells in `_simulate_truth`. All shifts are on the natural-log scale of the rate.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations as pairs_of
from numbers import Integral

import numpy as np
import pandas as pd
from scipy import sparse
from scipy.special import expit

from pertura.datasets._simulate_settings import Settings, require

CONTROL = "control"
PROBABILITY_ACTIVATING = 0.7
OFF_TARGET_STRENGTH = 0.3

# Label and sentence of a drug class: enough for a text encoder to tell the classes apart, and no gene
# name in it, because a description that names the targets would give the answer away.
_DRUG_CLASSES = (
    ("HDAC inhibitor", "blocks histone deacetylases and opens chromatin"),
    ("proteasome inhibitor", "stops protein degradation and causes proteotoxic stress"),
    ("MEK inhibitor", "shuts down growth factor signalling through the MAP kinase cascade"),
    ("topoisomerase poison", "breaks DNA during replication and activates the damage checkpoint"),
    ("glucocorticoid agonist", "binds the steroid hormone receptor and dampens inflammation"),
    ("BET inhibitor", "displaces bromodomain proteins from acetylated enhancers"),
    ("microtubule destabiliser", "prevents spindle assembly and arrests cells in mitosis"),
    ("HSP90 inhibitor", "releases client proteins from the heat shock chaperone"),
)


@dataclass(frozen=True, kw_only=True)
class World:
    """The planted truth. C contexts, G genes, K conditions (the first is control), B batches."""

    genes: pd.DataFrame  # G rows: var of the AnnData
    regulators: np.ndarray  # (n_regulators,) positions in the genes
    network: np.ndarray  # (n_regulators, G) direct weights [regulator, target]
    propagation: np.ndarray  # (n_regulators, G) effect of a unit innovation through all paths of length >= 1
    baseline: np.ndarray  # (C, G) log-rate of control cells
    contexts: pd.DataFrame  # C rows: biomarker_activity, response_factor
    perturbations: pd.DataFrame  # one row per single perturbation: ec50, hill
    targets: pd.DataFrame  # perturbation, target, shift: direct shifts at saturating dose
    interactions: pd.DataFrame  # perturbation (A+B), target, shift
    drugs: pd.DataFrame | None  # drug_class, description
    conditions: pd.DataFrame  # K rows: perturbation, dose; the first is control
    shift: np.ndarray  # (K, G) log-rate shift where the response factor is one
    batch_shift: np.ndarray  # (B, G)
    artefact_shift: np.ndarray  # (G,)

    @property
    def network_matrix(self) -> sparse.csr_matrix:
        """Weights as a (G, G) sparse matrix `[source, target]`."""
        square = sparse.lil_matrix((len(self.genes),) * 2, dtype=np.float32)
        square[self.regulators] = self.network.astype(np.float32)
        return square.tocsr()


def draw_world(s: Settings) -> World:
    """Draw everything that is planted; each part has its own generator, so one leaves the others alone."""
    rng_genes, rng_net, rng_context, rng_effect, rng_technical = (
        np.random.default_rng(child) for child in np.random.SeedSequence(s.seed).spawn(5)
    )
    groups = np.split(rng_genes.permutation(s.n_genes), np.cumsum([s.n_regulators, s.n_biomarkers, s.n_artefact_genes]))
    regulators, biomarkers, artefact_genes = (np.sort(group) for group in groups[:3])
    genes = _name_genes(s, regulators, biomarkers, artefact_genes)
    network = _draw_network(s, rng_net, regulators)
    propagation = np.linalg.solve(np.eye(s.n_regulators) - network[:, regulators], network)

    # Regulators and biomarkers sit above the median: a knock-down of a gene nobody sees teaches nothing.
    deviation = s.baseline_sd * rng_genes.standard_normal(s.n_genes)
    seen = np.concatenate([regulators, biomarkers])
    deviation[seen] = np.abs(deviation[seen])
    activity = rng_context.uniform(0.5, 1.5, s.n_contexts)
    activity[s.n_contexts - s.n_unresponsive_contexts :] *= -1
    baseline = 5.0 + deviation + s.context_sd * rng_context.standard_normal((s.n_contexts, s.n_genes))
    baseline[:, biomarkers] = 5.0 + deviation[biomarkers] + activity[:, None]
    contexts = pd.DataFrame(
        {"biomarker_activity": activity, "response_factor": expit(s.response_slope * activity)},
        index=_numbered("context_", s.n_contexts),
    )

    names, direct, drugs = _draw_perturbations(s, rng_effect, genes.index[regulators])
    genes["is_perturbed"] = np.isin(np.arange(s.n_genes), regulators[np.any(direct != 0, axis=0)])
    perturbations = pd.DataFrame({"hill": float(s.hill)}, index=names)
    if s.doses is not None:
        positive = np.array([u for u in s.doses if u > 0], dtype=float)
        middle = np.log10(positive).mean()
        perturbations["ec50"] = 10 ** (middle + rng_effect.uniform(-0.5, 0.5, s.n_perturbations))
    pairs = _read_combinations(s, rng_effect, names)
    between = _draw_interactions(s, rng_effect, pairs, direct)
    labels = names + ["+".join(names[i] for i in pair) for pair in pairs]
    conditions, direct_by_condition = _cross_with_doses(s, labels, pairs, direct, between, perturbations)
    total = propagation.copy()
    total[np.arange(s.n_regulators), regulators] += 1.0

    batch_shift = s.batch_sd * rng_technical.standard_normal((s.n_batches, s.n_genes))
    artefact_shift = np.zeros(s.n_genes)
    artefact_shift[artefact_genes] = s.artefact_size * rng_technical.uniform(0.5, 1.5, s.n_artefact_genes)
    return World(
        genes=genes,
        regulators=regulators,
        network=network,
        propagation=propagation,
        baseline=baseline,
        contexts=contexts,
        perturbations=perturbations,
        targets=_tidy(direct, names, genes.index[regulators]),
        interactions=_tidy(between, labels[len(names) :], genes.index[regulators]),
        drugs=drugs,
        conditions=conditions,
        shift=direct_by_condition @ total,
        batch_shift=batch_shift - batch_shift.mean(axis=0),
        artefact_shift=artefact_shift,
    )


def _numbered(prefix: str, n: int) -> list[str]:
    width = len(str(n))
    return [f"{prefix}{i:0{width}d}" for i in range(1, n + 1)]


def _name_genes(
    s: Settings, regulators: np.ndarray, biomarkers: np.ndarray, artefact_genes: np.ndarray
) -> pd.DataFrame:
    """Name the genes; artefact genes get the "MT-" by which quality control recognises them."""
    names = np.array(_numbered("GENE", s.n_genes), dtype=object)
    names[regulators] = _numbered("TF", s.n_regulators)
    names[artefact_genes] = _numbered("MT-", s.n_artefact_genes)
    positions = np.arange(s.n_genes)
    columns = {"is_regulator": regulators, "is_biomarker": biomarkers, "is_artefact": artefact_genes}
    return pd.DataFrame({name: np.isin(positions, where) for name, where in columns.items()}, index=names)


def _draw_network(s: Settings, rng: np.random.Generator, regulators: np.ndarray) -> np.ndarray:
    """Draw signed weights `(n_regulators, G)` without loops.

    The absolute weights into a gene sum to `network_gain` < 1 at most. That bounds the spectral radius by
    the gain, and every propagated shift by the largest direct one over (1 - gain).
    """
    shape = (s.n_regulators, s.n_genes)
    allowed = np.ones(shape, dtype=bool)
    allowed[np.arange(s.n_regulators), regulators] = False
    if s.acyclic:
        rank = rng.permutation(s.n_regulators)
        allowed[:, regulators] &= rank[:, None] < rank[None, :]
    edges = allowed & (rng.random(shape) < s.network_density)
    sign = np.where(rng.random(shape) < PROBABILITY_ACTIVATING, 1.0, -1.0)
    weights = edges * sign * rng.uniform(0.5, 1.0, shape) * s.network_gain
    incoming = np.abs(weights).sum(axis=0)
    return weights * np.minimum(1.0, s.network_gain / np.maximum(incoming, 1e-12))


def _draw_perturbations(
    s: Settings, rng: np.random.Generator, regulators: pd.Index
) -> tuple[list[str], np.ndarray, pd.DataFrame | None]:
    """Draw names, direct shifts `(n_perturbations, n_regulators)` and, for drugs with classes, their text."""
    shape = (s.n_perturbations, s.n_regulators)
    strength = s.effect_size * rng.uniform(0.75, 1.25, shape)
    if s.perturbation_type != "drug":
        chosen = np.sort(rng.choice(s.n_regulators, s.n_perturbations, replace=False))
        direct = np.zeros(shape)
        rows = np.arange(s.n_perturbations)
        direct[rows, chosen] = strength[rows, chosen] * (-1 if s.perturbation_type == "knockout" else 1)
        return regulators[chosen].tolist(), direct, None

    n_groups = s.n_drug_classes or s.n_perturbations
    order = rng.random((n_groups, s.n_regulators)).argsort(axis=1)
    signs = np.where(rng.random(order.shape) < 0.75, -1.0, 1.0)  # most drugs inhibit
    pattern = np.where(order < s.targets_per_drug, signs, 0.0)
    group = np.arange(s.n_perturbations) % n_groups
    direct = pattern[group] * strength
    names = _numbered("DRUG", s.n_perturbations)
    if s.n_drug_classes == 0:
        return names, direct, None
    # Drugs of a class differ in potency per target and in one weak target of their own.
    own = rng.integers(s.n_regulators, size=s.n_perturbations)
    direct[np.arange(s.n_perturbations), own] -= OFF_TARGET_STRENGTH * s.effect_size
    return names, direct, _describe(names, group)


def _describe(names: list[str], group: np.ndarray) -> pd.DataFrame:
    """Text of each drug: class label, and a sentence about the class."""
    turn, kind = np.divmod(group, len(_DRUG_CLASSES))
    labels = [_DRUG_CLASSES[k][0] + (f" type {t + 1}" if t else "") for k, t in zip(kind, turn, strict=True)]
    text = [
        f"{name} is a {label} that {_DRUG_CLASSES[k][1]}." for name, label, k in zip(names, labels, kind, strict=True)
    ]
    return pd.DataFrame({"drug_class": labels, "description": text}, index=names)


def _read_combinations(s: Settings, rng: np.random.Generator, names: list[str]) -> list[tuple[int, int]]:
    """Positions of the two members of each combination."""
    every = list(pairs_of(range(len(names)), 2))
    if isinstance(s.combinations, Integral) and not isinstance(s.combinations, bool):
        need = f"a list of pairs, or a number from 0 to {len(every)}, as many as {len(names)} names form"
        require(0 <= s.combinations <= len(every), "combinations", s.combinations, need)
        return [every[i] for i in np.sort(rng.choice(len(every), s.combinations, replace=False))]
    need = f"a number, or a list of different pairs such as 'A+B' or ('A', 'B') of {names}"
    listed = not isinstance(s.combinations, str) and np.iterable(s.combinations)
    require(listed, "combinations", s.combinations, need)
    pairs = []
    for found in s.combinations:
        members = found.split("+") if isinstance(found, str) else list(found)
        require(
            len(members) == 2 and len(set(members)) == 2 and set(members) <= set(names),
            "combinations",
            found,
            need,
        )
        pairs.append((names.index(members[0]), names.index(members[1])))
    different = len({frozenset(pair) for pair in pairs}) == len(pairs)
    require(different, "combinations", s.combinations, need)
    return pairs


def _draw_interactions(
    s: Settings, rng: np.random.Generator, pairs: list[tuple[int, int]], direct: np.ndarray
) -> np.ndarray:
    """Draw for each pair the shift `(n_pairs, n_regulators)` of one regulator that neither member targets."""
    between = np.zeros((len(pairs), s.n_regulators))
    if not pairs or s.interaction == 0:
        return between
    members = np.array(pairs)
    free = (direct[members] == 0).all(axis=1)
    need = "zero, because a combination hits every regulator and leaves none to interact on"
    require(bool(free.any(axis=1).all()), "interaction", s.interaction, need)
    chosen = np.where(free, rng.random(free.shape), -1.0).argmax(axis=1)
    sign = rng.choice([-1.0, 1.0], size=len(pairs))
    between[np.arange(len(pairs)), chosen] = sign * s.interaction * s.effect_size
    return between


def _cross_with_doses(
    s: Settings,
    labels: list[str],
    pairs: list[tuple[int, int]],
    direct: np.ndarray,
    between: np.ndarray,
    perturbations: pd.DataFrame,
) -> tuple[pd.DataFrame, np.ndarray]:
    """Give the conditions and their direct shifts `(K, n_regulators)`, control first."""
    n = len(perturbations)
    if s.doses is None:
        dose, response = np.array([np.nan]), np.ones((n, 1))
    else:
        dose = np.asarray(s.doses, dtype=float)
        power = dose[None, :] ** s.hill
        response = power / (power + perturbations["ec50"].to_numpy()[:, None] ** s.hill)
    singles = direct[:, None, :] * response[:, :, None]
    first, second = (np.array([pair[k] for pair in pairs], dtype=int) for k in (0, 1))
    both = (response[first] * response[second])[:, :, None]
    doubles = singles[first] + singles[second] + both * between[:, None, :]
    shifts = np.concatenate([singles, doubles]).reshape(-1, s.n_regulators)
    conditions = pd.DataFrame({"perturbation": [CONTROL, *np.repeat(labels, len(dose))]})
    if s.doses is not None:
        conditions["dose"] = np.concatenate([[0.0], np.tile(dose, len(labels))])
    return conditions, np.vstack([np.zeros((1, s.n_regulators)), shifts])


def _tidy(shifts: np.ndarray, names: list[str], regulators: pd.Index) -> pd.DataFrame:
    """Non-zero entries as rows: perturbation, target, shift."""
    row, column = np.nonzero(shifts)
    return pd.DataFrame(
        {
            "perturbation": np.array(names, dtype=object)[row] if names else np.array([], dtype=object),
            "target": regulators.to_numpy(dtype=object)[column],
            "shift": shifts[row, column],
        },
        index=pd.RangeIndex(len(row)).astype(str),
    )
