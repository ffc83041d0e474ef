"""Break the source in one place at a time, and see whether the tests notice.

Not collected by pytest: ``python tests/mutants.py`` from the root of the repository takes minutes, ``--only NAME`` seconds. A test of
the default suite sees to it that every mutant still applies. A mutant that no test kills is a gap in the tests, unless
:attr:`Mutant.survives` says why it can not be told from the original.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src"
# imported once, before the processes of the mutants part: none of them may import pertura
PRELOADED = ["pytest", "scanpy", "scvi", "lightning.pytorch", "pyro.infer", "sklearn.decomposition", "mudata", "numba"]


@dataclass(frozen=True)
class Mutant:
    """One change of the source that some test must notice.

    Attributes
    ----------
    name
        What a user would suffer.
    file
        Below ``src/pertura``.
    find, replace
        Text that occurs exactly once in the file, and what takes its place.
    tests
        Files below ``tests`` that are to notice, separated by blanks.
    keyword
        Which of their tests, as pytest's ``-k``.
    survives
        Why no test can notice, where that is so.
    """

    name: str
    file: str
    find: str
    replace: str
    tests: str
    keyword: str = ""
    survives: str = ""

    def applied(self, text: str) -> str:
        """The file with the change.

        Raises
        ------
        ValueError
            If the text does not occur exactly once: the source has changed, and the mutant must follow.
        """
        if (n := text.count(self.find)) != 1:
            raise ValueError(f"mutant {self.name} no longer applies: {self.file} has its text {n} times, not once")
        return text.replace(self.find, self.replace)


TRUTH, TRAINING = "model/test_contract_truth.py", "model/test_contract_training.py"
QUERIES, RESULTS, NUMBERS = (
    "model/test_contract_queries.py",
    "model/test_contract_results.py",
    "model/test_prediction_numbers.py",
)

MUTANTS = [
    # -- likelihoods and layers -------------------------------------------------------------------------------------
    Mutant(
        "continuous-offset-dropped",
        "nn/_likelihoods.py",
        "return Gaussian(loc + offset, scale)",
        "return Gaussian(loc, scale)",
        "nn/test_likelihoods.py",
    ),
    Mutant(
        "continuous-effect-dropped-in-models",
        "nn/_likelihoods.py",
        "return Gaussian(loc + offset, scale)",
        "return Gaussian(loc, scale)",
        TRUTH,
        "continuous and GPOVAE",
    ),
    Mutant(
        "count-offset-dropped",
        "nn/_likelihoods.py",
        "self.amount(activation + offset)\n        return share",
        "amount\n        return share",
        "nn/test_likelihoods.py",
    ),
    Mutant(
        "other-genes-not-scored",
        "nn/_likelihoods.py",
        "return super().log_prob(value) + NegativeBinomial(mean, self.theta).log_prob(rest).squeeze(-1)",
        "return super().log_prob(value)",
        "nn/test_likelihoods.py",
        "other_genes",
    ),
    Mutant(
        "other-genes-have-no-share",
        "nn/_likelihoods.py",
        "return total if self.rest is None else total + self.rest",
        "return total",
        "nn/test_likelihoods.py",
        "other_genes",
    ),
    Mutant(
        "replicates-at-the-wrong-mean",
        "nn/_likelihoods.py",
        "(self._theta / self._mean).expand(shape)",
        "torch.ones_like(self._mean).expand(shape)",
        "nn/test_likelihoods.py",
    ),
    Mutant(
        "replicates-without-dispersion",
        "nn/_likelihoods.py",
        "return torch.poisson(rate)",
        "return torch.poisson(self._mean.expand(shape))",
        TRUTH,
        "replicates and SAMSVAE",
    ),
    Mutant(
        "residual-not-kept",
        "nn/_likelihoods.py",
        "return self.loc + self.scale * noise",
        "return self.loc",
        "nn/test_likelihoods.py",
    ),
    Mutant(
        "mask-scored-as-uniform",
        "nn/_masks.py",
        "value * self.logits - F.softplus(self.logits)",
        "0.0 * value * self.logits - F.softplus(self.logits)",
        "module/test_samsvae.py",
        "mask",
    ),
    Mutant(
        "bags-of-unequal-weight",
        "nn/_selector.py",
        "return self.w(h).softmax(-3)",
        "return self.w(h).sigmoid()",
        "nn/test_selector.py",
    ),
    Mutant(
        "flow-steps-not-reversed",
        "nn/_flows.py",
        "reverse = T.Permute(torch.arange(self.n_latent - 1, -1, -1, device=h.device))",
        "reverse = T.Permute(torch.arange(self.n_latent, device=h.device))",
        "nn/test_flows.py",
    ),
    Mutant(
        "network-paths-dropped",
        "nn/_sem.py",
        "return torch.linalg.solve(_unregulated(weight, regulators), weight)",
        "return weight",
        "nn/test_sem.py",
    ),
    # -- doses ------------------------------------------------------------------------------------------------------
    Mutant(
        "dose-ignored-logarithmic",
        "module/_latent.py",
        "return torch.log1p(kappa * dose) / torch.log1p(kappa)",
        "return (dose > 0) + 0.0 * kappa",
        "module/test_samsvae.py",
        "logarithmic",
    ),
    Mutant(
        "dose-ignored-hill",
        "module/_latent.py",
        "return power * (1.0 + k.pow(n)) / (power + k.pow(n))",
        "return (dose > 0) + 0.0 * power * k.pow(n)",
        "module/test_cpa.py module/test_drugaae.py effects/test_dosed.py",
    ),
    Mutant(
        "dose-ignored-by-perturbx",
        "module/_perturbx.py",
        "strength = torch.log1p(action.dose) / np.log(2.0) * (action.codes >= 0)",
        "strength = (action.dose > 0).float() * (action.codes >= 0)",
        "module/test_perturbx.py",
        "dose",
    ),
    Mutant(
        "dose-ignored-by-infosem",
        "module/_infosem.py",
        "action.dose.clamp(max=1.0) * present",
        "(action.dose > 0) * present",
        "module/test_infosem.py",
        "doses",
    ),
    Mutant(
        "dose-not-interpolated",
        "effects/_contexts.py",
        "weights[above[has_above]] += share[has_above]",
        "weights[above[has_above]] += 1.0",
        TRUTH,
        "dose and Additive",
    ),
    Mutant(
        "dose-interpolated-without-logarithms",
        "effects/_contexts.py",
        "share[inside] = (strength - low[inside]) / (high - low)[inside]",
        "share[inside] = (np.exp(strength) - np.exp(low[inside])) / (np.exp(high) - np.exp(low))[inside]",
        "effects/test_doses.py",
    ),
    Mutant(
        "small-screens-tell-nothing-of-features",
        "effects/_kernels.py",
        "min(_MAX_COMPONENTS, n // _ROWS_PER_COMPONENT)",
        "min(_MAX_COMPONENTS, n)",
        "effects/test_kernels.py",
        "twenty",
    ),
    Mutant(
        "one-strong-perturbation-decides-which-features-help",
        "effects/_kernels.py",
        "(_FREEDOM + dual.shape[1]) * np.log1p(distance / _FREEDOM)",
        "distance",
        "effects/test_kernels.py",
        "far_off",
    ),
    Mutant(
        "known-effects-of-a-context-say-nothing",
        "effects/_transfer.py",
        "return fit.slope * x + covariance @ fit.inverse @ fit.left",
        "return x",
        "effects/test_transfer.py",
    ),
    Mutant(
        "few-known-effects-of-a-context-say-nothing",
        "effects/_transfer.py",
        "log_variance = self._in_other_contexts(context)",
        "log_variance = None",
        "effects/test_transfer.py",
        "other_contexts_have_learned",
    ),
    Mutant(
        "what-a-context-lacks-is-as-elsewhere",
        "model/base/_departures.py",
        "if transfer.knows(int(c)):",
        "if False:",
        "model/test_departures.py",
        "lacks and SAMSVAE",
    ),
    Mutant(
        "noise-of-controls-taken-for-an-effect",
        "effects/_transfer.py",
        "return mean + shared + kernel",
        "return mean + kernel",
        "effects/test_transfer.py",
        "noise_of_the_controls",
    ),
    Mutant(
        "a-condition-predicts-itself",
        "effects/_transfer.py",
        "others = np.eye(len(fit.rows)) - fit.inverse / precision",
        "others = np.eye(len(fit.rows))",
        "effects/test_transfer.py",
        "left_out",
    ),
    Mutant(
        "rows-of-effects-are-their-own-control",
        "data/_cells.py",
        "out[KEYS.X].zero_()",
        "pass",
        "model/test_effects_data.py",
        "zero",
    ),
    Mutant(
        "few-cells-taken-as-they-are",
        "model/_perturbx.py",
        'if self.options.target == "mse":',
        "if False:",
        "model/test_perturbx.py",
        "few_cells",
    ),
    Mutant(
        "dose-zero-is-a-perturbation",
        "module/_base.py",
        "return (self.codes != -1) & (self.dose > 0)",
        "return self.codes != -1",
        "module/test_drugaae.py module/test_added_effects.py module/test_pertvae.py",
        "dose or same or padding",
    ),
    Mutant(
        "doses-of-members-exchanged",
        "data/_vocabulary.py",
        "row[: len(members[label])] = [own[m] for m in members[label]]",
        "row[: len(members[label])] = list(own.values())[: len(members[label])]",
        "data/test_vocabulary.py",
    ),
    Mutant(
        "asked-dose-in-the-wrong-unit",
        "data/_perturbation.py",
        "np.asarray(perturbation.dose) / dose_units(vocabulary.max_dose)[codes[:n]]",
        "np.asarray(perturbation.dose)",
        "effects/test_discrepancy.py",
        "encoded",
    ),
    # -- batches, contexts, pairs -----------------------------------------------------------------------------------
    Mutant(
        "batch-ignored",
        "module/_latent.py",
        "return F.one_hot(batch.clamp(max=self.n_batch - 1), self.n_batch).to(self.input_mean)",
        "return 0.0 * F.one_hot(batch.clamp(max=self.n_batch - 1), self.n_batch).to(self.input_mean)",
        QUERIES,
        "batch_of_the_cell and CPA",
    ),
    Mutant(
        "batch-ignored-by-pertvae",
        "module/_pertvae.py",
        "self.decoder(self.with_batch(z, cells.batch))",
        "self.decoder(self.with_batch(z, cells.batch * 0))",
        QUERIES,
        "batch_of_the_cell and PertVAE",
    ),
    Mutant(
        "batch-ignored-by-samsvae",
        "module/_samsvae.py",
        "h = self.decoder(state if self.gene_effects is None else z, self.one_hot_batch(cells.batch))",
        "h = self.decoder(state if self.gene_effects is None else z, self.one_hot_batch(cells.batch * 0))",
        QUERIES,
        "batch_of_the_cell and SAMSVAE",
    ),
    Mutant(
        "descriptions-believed-alike-in-all-contexts",
        "module/_drugaae.py",
        "full * strength + middle",
        "strength + middle",
        "module/test_drugaae.py",
        "amplitude",
    ),
    Mutant(
        "amplitudes-not-measured",
        "effects/_dosed.py",
        "terms[own].T @ agreed[own] + prior",
        "terms[own].T @ length[own] + prior",
        "effects/test_dosed.py",
        "amplitude",
    ),
    Mutant(
        "batch-ignored-by-drugaae",
        "module/_drugaae.py",
        "return self.decoder_out(self.decoder(self.with_batch(state, batch)))",
        "return self.decoder_out(self.decoder(self.with_batch(state, batch * 0)))",
        QUERIES,
        "batch_of_the_cell and DrugAAE",
    ),
    Mutant(
        "batch-ignored-by-infosem",
        "module/_infosem.py",
        "return cells.batch.clamp(max=self.n_batch - 1)",
        "return cells.batch * 0",
        QUERIES,
        "batch_of_the_cell and InfoSEM",
    ),
    Mutant(
        "effects-across-batches",
        "effects/_table.py",
        "weight = cells[own][:, self.control_batch[groups]] / n[own, None]",
        "weight = 0.0 * cells[own][:, self.control_batch[groups]]",
        "effects/test_table.py",
        "batch",
    ),
    Mutant(
        "pairs-across-batches",
        "model/_pertvae.py",
        'return strata(where, cells.is_control, ["context", "batch"])',
        'return strata(where, cells.is_control, ["context"])',
        "model/test_pertvae.py",
        "same_context_and_batch",
    ),
    Mutant(
        "pairs-across-contexts",
        "data/_pairs.py",
        "code = obs.groupby(keys[:k], observed=True, sort=False).ngroup().to_numpy() + offset",
        "code = obs.groupby(keys[k - 1 : k], observed=True, sort=False).ngroup().to_numpy() + offset",
        "data/test_pairs.py",
    ),
    Mutant(
        "always-the-first-partner",
        "data/_pairs.py",
        "return self.partners[self.start + (u * self.count).astype(np.int64)]",
        "return self.partners[self.start]",
        "data/test_pairs.py data/test_cells.py",
    ),
    Mutant(
        "bags-of-both-sides-share-controls",
        "data/_bags.py",
        "2 * context[is_control] + half",
        "2 * context[is_control]",
        "data/test_bags.py",
    ),
    Mutant(
        "bags-of-the-same-cells",
        "data/_bags.py",
        "rng = np.random.default_rng([self.seed, self.epoch if self.shuffle else 0])",
        "rng = np.random.default_rng([self.seed, 0])",
        "data/test_bags.py",
    ),
    # -- intervals and draws ----------------------------------------------------------------------------------------
    Mutant(
        "cell-intervals-of-80-percent",
        "model/base/_predict.py",
        "((1 - ci) / 2, (1 + ci) / 2)",
        "(1 - ci, ci)",
        TRUTH,
        "quantiles and Additive",
    ),
    Mutant(
        "effect-intervals-of-80-percent",
        "model/base/_effects.py",
        "z = stats.norm.ppf((1 + ci) / 2)",
        "z = stats.norm.ppf(ci)",
        NUMBERS,
        "consistent and Additive",
    ),
    Mutant(
        "cell-intervals-widened-too-little",
        "model/base/_predict.py",
        "self.ci, self.z = ci, float(stats.norm.ppf((1 + ci) / 2))",
        "self.ci, self.z = ci, float(stats.norm.ppf(ci))",
        NUMBERS,
        "widen_on_the_scale and Additive",
    ),
    Mutant(
        "own-discrepancy-forgotten-in-cells",
        "model/base/_predict.py",
        "gene[row] = there.gene + here.gene + self.discrepancy.noise",
        "gene[row] = there.gene + self.discrepancy.noise",
        TRUTH,
        "taken_back_is and Additive",
    ),
    Mutant(
        "blocks-share-their-noise",
        "model/base/_predict.py",
        "[self._predictor.settings.seed, self._index, purpose]",
        "[self._predictor.settings.seed, 0, purpose]",
        TRUTH,
        "blocks and InfoSEM",
    ),
    Mutant(
        "prediction-seed-ignored",
        "model/base/_predict.py",
        "number = int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> 1)",
        "number = int(np.random.SeedSequence(0).generate_state(1, np.uint64)[0] >> 1)",
        NUMBERS,
        "other_seeds and SAMSVAE",
    ),
    Mutant(
        "training-seed-ignored",
        "model/base/_train.py",
        "seeded(seed, runner.device)",
        "seeded(0, runner.device)",
        TRAINING,
        "test_seeds and PerturbX",
    ),
    Mutant(
        "global-random-state-disturbed",
        "model/base/_predict.py",
        "torch.set_rng_state(state)",
        "pass",
        NUMBERS,
        "global_random and SAMSVAE",
    ),
    Mutant(
        "draws-in-equal-pairs",
        "module/_draws.py",
        "torch.cat([half, -half])",
        "torch.cat([half, half])",
        "module/test_samsvae.py",
        "antithetic",
    ),
    Mutant(
        "draws-of-effects-forgotten",
        "model/base/_effects.py",
        "total, left = change.var(0, ddof=1), change - effect",
        "total, left = 0.0 * change.var(0, ddof=1), change - effect",
        TRUTH,
        "intervals_of_effects and Additive",
    ),
    Mutant(
        "proba-de-of-the-wrong-side",
        "model/base/_effects.py",
        "stats.norm.sf((delta - np.abs(effect[c]))",
        "stats.norm.sf((-delta - np.abs(effect[c]))",
        NUMBERS,
        "consistent and Additive",
    ),
    Mutant(
        "effects-with-the-wrong-sign",
        "model/base/_effects.py",
        "change = perturbed[q] - control",
        "change = control - perturbed[q]",
        NUMBERS,
        "means_over_control and Additive",
    ),
    Mutant(
        "effects-over-treated-cells-too",
        "model/base/_query.py",
        "self.at(self.rows[control | ~np.isin(context, np.unique(context[control]))])",
        "self.at(self.rows)",
        NUMBERS,
        "means_over_control and Additive",
    ),
    Mutant(
        "fold-changes-of-logarithms",
        "model/base/_effects.py",
        "before, after = np.expm1(before), np.expm1(after)",
        "pass",
        NUMBERS,
        "consistent and Additive",
    ),
    # -- what is written --------------------------------------------------------------------------------------------
    Mutant(
        "repressed-genes-without-evidence",
        "effects/_ranked.py",
        "wrong_sign = stats.norm.sf(np.abs(score))",
        "wrong_sign = stats.norm.sf(score)",
        RESULTS,
        "table_of_scanpy and Additive",
    ),
    Mutant(
        "genes-ranked-upside-down",
        "effects/_ranked.py",
        'order = np.argsort(-score, kind="stable")',
        'order = np.argsort(score, kind="stable")',
        RESULTS,
        "effect_table_is_the_one and Additive",
    ),
    Mutant(
        "keys-of-the-user-overwritten",
        "model/base/_write.py",
        'if key in getattr(adata, slot) and f"{slot}/{key}" not in own',
        "if False",
        RESULTS,
        "not_overwritten and Additive",
    ),
    Mutant(
        "results-in-the-wrong-rows",
        "model/base/_write.py",
        "layer[np.ix_(rows, genes)] = values[0]",
        "layer[np.ix_(np.sort(rows), genes)] = values[0]",
        RESULTS,
        "rows_that_were_not and Additive",
    ),
    Mutant(
        "basal-states-in-the-wrong-rows",
        "model/base/_write.py",
        "matrix[rows] = values",
        "matrix[np.sort(rows)] = values",
        RESULTS,
        "rows_that_were_not and Additive",
    ),
    Mutant(
        "genes-by-position",
        "data/_cells.py",
        "return block if self.columns is None else block[:, self.columns]",
        "return block if self.columns is None else block[:, : len(self.columns)]",
        QUERIES,
        "matched_by_name and Additive",
    ),
    Mutant(
        "prediction-files-continued-at-the-wrong-cell",
        "model/base/_out.py",
        "target[start + self.done : start + stop]",
        "target[start : start + part.n_cells]",
        "model/test_prediction_files.py",
        "continued",
    ),
    Mutant(
        "windows-are-not-read-ahead",
        "data/_cells.py",
        "if batch.ahead is not None and self._ahead is None:",
        "if False:",
        "data/test_stream.py",
        "meanwhile",
    ),
    Mutant(
        "backed-rows-in-file-order",
        "data/_cells.py",
        "return block if len(rows) == len(unique) and (inverse[1:] > inverse[:-1]).all() else block[inverse]",
        "return block",
        QUERIES,
        "backed_file and Additive",
    ),
    # -- measured effects -------------------------------------------------------------------------------------------
    Mutant(
        "control-noise-forgotten-in-precision",
        "effects/_table.py",
        "noise[own] = 1.0 / number + of_controls",
        "noise[own] = 1.0 / number",
        "effects/test_table.py",
    ),
    Mutant(
        "control-noise-forgotten-in-errors",
        "effects/_table.py",
        " + variance[at] * of_controls[:, None])",
        ")",
        "effects/test_table.py",
    ),
    Mutant(
        "one-half-of-the-cells-empty",
        "effects/_table.py",
        "half[order] = (np.arange(len(order)) - start + 1) % 2",
        "half[order] = 0",
        "effects/test_table.py",
    ),
    Mutant(
        "depth-passes-for-an-effect",
        "effects/_table.py",
        "treated, plan = self.treated, self.thinning if adjust_depth else None",
        "treated, plan = self.treated, None",
        "effects/test_table.py",
        "depth",
    ),
    Mutant(
        "deep-cells-not-thinned",
        "effects/_table.py",
        "mean = mean + _part(self.n, self.thinned, half, treated)",
        "pass",
        "effects/test_depth.py",
        "effect_of_equal_depth",
    ),
    Mutant(
        "deep-controls-not-thinned",
        "effects/_table.py",
        "effect[own] -= share[:, None] * (weight @ change[groups])",
        "pass",
        "effects/test_depth.py",
        "effect_of_equal_depth",
    ),
    Mutant(
        "depths-differ-in-metrics",
        "effects/_depth.py",
        "Thinning.of(depth[treated] - depth[reference[treated]],",
        "Thinning.of(0.0 * depth[treated],",
        "effects/test_depth.py",
        "shallow_arms or means_of_groups",
    ),
    Mutant(
        "thinned-to-the-deepest-step",
        "effects/_depth.py",
        "weight = np.clip(1.0 - np.abs(at[:, None] - np.arange(1, n_steps + 1)), 0.0, 1.0)",
        "weight = (at[:, None] > 0) * (np.arange(1, n_steps + 1) == n_steps) * 1.0",
        "effects/test_depth.py",
        "shallow_arms",
    ),
    Mutant(
        "programs-forgotten-in-sd",
        "effects/_shrink.py",
        "sd = np.sqrt((own + known) * (1.0 - gain) + (1.0 - gain) ** 2 * spread)",
        "sd = np.sqrt((own + known) * (1.0 - gain))",
        "effects/test_shrink.py",
        "wide",
    ),
    Mutant(
        "nothing-is-shrunk",
        "effects/_shrink.py",
        "mean = common + gain * (y - common)",
        "mean = y",
        "effects/test_shrink.py",
    ),
    Mutant(
        "priors-chosen-upside-down",
        "effects/_shrink.py",
        "settings[int(scores.argmax())] if scores.any()",
        "settings[int(scores.argmin())] if scores.any()",
        "effects/test_shrink.py",
    ),
    Mutant(
        "uncertainty-of-measured-effects-not-drawn",
        "effects/_measured.py",
        "torch.addcmul(mean, sd, noise(rows))",
        "torch.addcmul(mean, sd, 0.0 * noise(rows))",
        "effects/test_measured.py",
        "noise",
    ),
    Mutant(
        "members-uncertainty-forgotten-in-sums",
        "effects/_measured.py",
        "sums @ mean[:n_perturbations], sums @ variance[:n_perturbations]",
        "sums @ mean[:n_perturbations], 0.0 * (sums @ variance[:n_perturbations])",
        "effects/test_measured.py",
        "without_cells",
    ),
    Mutant(
        "features-of-unseen-perturbations-ignored",
        "effects/_measured.py",
        "(strength[..., None] * features).sum(-2) @ self.feature_weight",
        "0.0 * (strength[..., None] * features).sum(-2) @ self.feature_weight",
        "effects/test_measured.py",
    ),
    Mutant(
        "more-than-everything-is-believed",
        "effects/_stacking.py",
        "share = share / max(1.0, share.sum())",
        "pass",
        "effects/test_stacking.py",
    ),
    Mutant(
        "gains-by-chance-are-believed",
        "effects/_stacking.py",
        "share[:] = 0.0",
        "share[:] *= 1.0",
        "effects/test_stacking.py",
    ),
    Mutant(
        "profiles-and-effects-share-controls",
        "module/_added_effects.py",
        "effect + (control - profiles[1 - half])[own]",
        "effect + (control - profiles[half])[own]",
        "module/test_added_effects.py",
    ),
    Mutant(
        "left-out-context-leaks",
        "effects/_contexts.py",
        "others = np.delete(np.arange(len(gram)), k)",
        "others = np.arange(len(gram))",
        "effects/test_contexts.py",
    ),
    Mutant(
        "new-contexts-as-certain-as-known-ones",
        "effects/_discrepancy.py",
        'total = total.at_least(self._error("new context").spread(level))',
        "pass",
        "effects/test_discrepancy.py",
    ),
    Mutant(
        "intervals-of-all-levels-as-of-a-normal",
        "effects/_discrepancy.py",
        "factor = (self.half_width(level) / stats.norm.ppf((1 + level) / 2)) ** 2",
        "factor = (self.half_width(_SD_LEVEL) / stats.norm.ppf((1 + _SD_LEVEL) / 2)) ** 2",
        "effects/test_discrepancy.py",
    ),
    Mutant(
        "left-out-errors-judge-themselves",
        "effects/_discrepancy.py",
        "without = gene2(total - own, len(number) - 1)[code]",
        "without = gene2(own, 1)[code]",
        "effects/test_discrepancy.py",
    ),
    Mutant(
        "amplitude-of-the-response-certain",
        "effects/_discrepancy.py",
        "np.sqrt(gene2(total, len(number))), k, math.sqrt(response2), tuple",
        "np.sqrt(gene2(total, len(number))), k, 0.0, tuple",
        "effects/test_discrepancy.py",
    ),
    Mutant(
        "strong-genes-missed-by-intervals",
        "effects/_discrepancy.py",
        "if strong is not None:",
        "if False:",
        "effects/test_discrepancy.py",
        "strong",
    ),
    Mutant(
        "errors-of-predictions-not-calibrated",
        "effects/_discrepancy.py",
        "return mean - (below**2 + half**2).sqrt(), mean + (above**2 + half**2).sqrt()",
        "return low, high",
        "effects/test_discrepancy.py",
    ),
    Mutant(
        "discrepancy-holds-the-noise",
        "effects/_discrepancy.py",
        "y = np.array([(square[b] - noise[b]).mean() for b in bins])",
        "y = np.array([square[b].mean() for b in bins])",
        "effects/test_discrepancy.py",
    ),
    Mutant(
        "few-cells-of-a-context-taken-as-measured",
        "effects/_measured.py",
        "mean[rows] = found.mean * table.spread",
        "mean[rows] = own.effect[kept][rows] - expected[rows]",
        "model/test_departures.py",
        "few_cells_help or few_do_not",
    ),
    Mutant(
        "departures-in-every-context",
        "effects/_contexts.py",
        "return asked.at_dose * ((self.label == asked.label) & (self.context == context)) * (asked.label >= 0)",
        "return asked.at_dose * (self.label == asked.label) * (asked.label >= 0)",
        "module/test_departures.py",
    ),
    Mutant(
        "alike-contexts-told-apart-by-pertvae",
        "effects/_stacking.py",
        "if energy - chance <= _LOW_HETEROGENEITY * energy:",
        "if energy <= 0.0:",
        "effects/test_stacking.py",
    ),
    # -- objectives -------------------------------------------------------------------------------------------------
    Mutant(
        "few-perturbations-do-not-stand-for-all",
        "module/_samsvae.py",
        "table = self.shifts.prior(plate)",
        "table = self.shifts.prior(pyro.plate('some', plate.subsample_size))",
        "module/test_samsvae.py",
        "stand_for_all",
    ),
    Mutant(
        "own-effect-not-taken-off-by-samsvae",
        "module/_samsvae.py",
        "u = u - self.gene_effects.delta(cells.action, self.strength(cells.action), cells.context) / self.input_scale",
        "pass",
        "module/test_samsvae.py",
        "without_their and SAMSVAE",
    ),
    Mutant(
        "state-not-kept-by-the-guide-of-samsvae",
        "module/_samsvae.py",
        "q = dist.Normal(q.loc - shift, q.scale)",
        "pass",
        "module/test_samsvae.py",
        "keeps_the_state",
    ),
    Mutant(
        "tails-of-small-counts-cut-off",
        "nn/_counts.py",
        "(left <= 1e-6 * width)",
        "(left <= width)",
        "nn/test_counts.py",
        "overlap",
    ),
    Mutant(
        "own-effect-not-taken-off-by-cradlevae",
        "module/_artifact.py",
        "u = module.standardized(cells.x, cells.library) - effect",
        "u = module.standardized(cells.x, cells.library)",
        "module/test_samsvae.py",
        "without_their and CRADLEVAE",
    ),
    Mutant(
        "own-effect-taken-off-twice",
        "module/_added_effects.py",
        "basal.state = basal.state - effect[:, which]",
        "basal.state = basal.state - 2.0 * effect[:, which]",
        TRUTH,
        "basal_states_are and Additive",
    ),
    Mutant(
        "own-effect-added-by-pertvae",
        "module/_pertvae.py",
        "return z - b if jacobian is None",
        "return z + b if jacobian is None",
        "module/test_pertvae.py",
        "take",
    ),
    Mutant(
        "warm-up-of-the-prior-alone",
        "module/_samsvae.py",
        'with pyro.plate("cells", len(cells)), pyro.poutine.scale(scale=kl_weight):',
        'with pyro.plate("cells", len(cells)):',
        TRUTH,
        "warm_up and SAMSVAE",
    ),
    Mutant(
        "residual-noise-forgotten",
        "module/_gene_effects.py",
        "scale = (sd.square() + site.log_tau.exp().square()).sqrt()",
        "scale = sd",
        TRAINING,
        "changes_every and SAMSVAE",
    ),
    Mutant(
        "effects-on-the-wrong-scale",
        "module/_gene_effects.py",
        "wanted = levels - base[:, None] + start",
        "wanted = levels",
        "module/test_samsvae.py",
        "activations",
    ),
    Mutant(
        "useless-descriptions-kept",
        "effects/_kernels.py",
        "used, weights, likelihood = fewer, simpler, without",
        "pass",
        "effects/test_kernels.py",
        "say_nothing",
    ),
    Mutant(
        "noise-of-perturbations-ignored",
        "effects/_kernels.py",
        "weights[-1] + self.noise[group] + 1e-9",
        "weights[-1] + 1e-9",
        "effects/test_kernels.py",
        "row_adds",
    ),
    Mutant(
        "passed-cells-moved-to-failed-ones",
        "module/_artifact.py",
        "fixed, kept = z.detach(), ",
        "fixed, kept = z, ",
        "module/test_cradlevae.py",
        "energy_distance",
    ),
    Mutant(
        "counterfactual-loss-rewarded",
        "module/_artifact.py",
        'pyro.factor("counterfactual", loss, has_rsample=True)',
        'pyro.factor("counterfactual", -loss, has_rsample=True)',
        "module/test_cradlevae.py",
        "counterfactual",
    ),
    Mutant(
        "class-balance-exchanged",
        "module/_artifact.py",
        "torch.where(cells.qc[:, 0] > 0, 1.0 - share, share)",
        "torch.where(cells.qc[:, 0] > 0, share, 1.0 - share)",
        "module/test_cradlevae.py",
        "balance",
    ),
    Mutant(
        "adversary-helped",
        "module/_cpa.py",
        "-weight * loss.sum()",
        "weight * loss.sum()",
        "module/test_cpa.py",
        "adversary",
    ),
    Mutant(
        "interactions-counted-twice",
        "module/_shifts.py",
        "0.5 * (each.sum(-2).square() - each.square().sum(-2))",
        "(each.sum(-2).square() - each.square().sum(-2))",
        "module/test_samsvae.py",
        "combinations",
    ),
    Mutant(
        "network-shift-floor-dropped",
        "model/_gpovae.py",
        "np.isfinite(variance) / (variance + self.options.shift_floor**2)",
        "np.isfinite(variance) / variance",
        "model/test_gpovae.py",
        "floor",
    ),
    Mutant(
        "noise-of-controls-is-an-effect",
        "effects/_network.py",
        "cross = used @ wanted - len(y[kept]) * common * np.array([1.0, 1.0, 0.0])",
        "cross = used @ wanted",
        "effects/test_unseen.py",
        "noise_of_the_controls",
    ),
    Mutant(
        "network-says-nothing-of-unseen",
        "effects/_network.py",
        "used = used * np.array([1.0, 1.0, which])[:, None]",
        "used = used * np.array([1.0, 1.0, 0.0])[:, None]",
        "effects/test_unseen.py",
        "share",
    ),
    Mutant(
        "edges-without-features",
        "model/_gpovae.py",
        "module.shift_precision[informed] = precision * module.possible[informed]",
        "pass",
        "model/test_gpovae.py",
        "features_tell",
    ),
    Mutant(
        "network-diagonal-allowed",
        "module/_gpovae.py",
        "weights = weights * self.possible",
        "pass",
        "module/test_gpovae.py",
        "inverse",
    ),
    Mutant(
        "state-sign-of-networks-left-to-chance",
        "module/_infosem.py",
        "torch.where(mean[:, 1] >= mean[:, 0], 1.0, -1.0)",
        "torch.where(mean[:, 1] >= mean[:, 0], 1.0, 1.0)",
        "module/test_infosem.py",
        "sign",
    ),
    Mutant(
        "noise-replaces-the-state",
        "module/_infosem.py",
        "(_MAX_SCALE - _MIN_SCALE) * log_scale.sigmoid()",
        "F.softplus(log_scale)",
        "model/test_infosem.py",
        "noise_of_its_own",
    ),
    Mutant(
        "archive-of-other-bytes-is-read",
        "datasets/_beeline_archive.py",
        "puller.load_registry_from_doi()",
        "puller.registry[archive] = None",
        "datasets/test_beeline_archive.py",
        "other_bytes",
    ),
    Mutant(
        "prior-of-pairs-ignored",
        "module/_infosem.py",
        "sd = sd * self.log_size.exp()",
        "pass",
        "module/test_infosem.py",
        "size_of_a_pair",
    ),
    Mutant(
        "weights-go-on-with-the-prior-they-taught",
        "module/_infosem.py",
        "self.network_weight.copy_(self._start(self.network_weight.shape) * self.no_loops)",
        "pass",
        "module/test_infosem.py",
        "anew",
    ),
    Mutant(
        "pairs-teach-their-own-prior",
        "module/_pairs.py",
        "keep = (source != a) & (source != b) & (target != a) & (target != b)",
        "keep = np.ones(len(source), dtype=bool)",
        "module/test_pairs.py",
    ),
    Mutant(
        "chance-coefficients-of-pairs-are-believed",
        "module/_pairs.py",
        "1 - (_DOUBT * error / np.where(mean == 0, 1.0, mean)) ** 2",
        "1 - (0.0 * error / np.where(mean == 0, 1.0, mean)) ** 2",
        "module/test_pairs.py",
    ),
    Mutant(
        "known-edges-judge-themselves",
        "module/_pairs.py",
        "train, test = (source != fold) & (target != fold), (source == fold) & (target == fold)",
        "train, test = source >= 0, (source == fold) & (target == fold)",
        "module/test_pairs.py",
    ),
    Mutant(
        "left-out-cells-do-not-choose",
        "effects/_coexpression.py",
        "_EVEN * even + (1 - _EVEN) * found / found.sum()",
        "even",
        "effects/test_coexpression.py",
    ),
    Mutant(
        "edges-ordered-by-weights-alone",
        "model/_infosem.py",
        'rank_by="proba" if ordered or module.pairs is not None else "weight"',
        'rank_by="weight"',
        "model/test_infosem.py",
        "left_out_cells",
    ),
    Mutant(
        "radius-of-absolute-weights",
        "module/_gpovae.py",
        "probe = matrix @ probe",
        "probe = matrix.abs() @ probe",
        "module/test_gpovae.py",
        "signs",
    ),
    Mutant(
        "networks-scored-by-another-order",
        "model/base/_grn.py",
        "network.frame(network.rank_by)",
        'network.frame("weight")',
        "model/test_network.py",
        "order_is",
    ),
    Mutant(
        "penalties-count-once-per-minibatch",
        "module/_perturbx.py",
        "share = len(x) / N_BAGS",
        "share = 1.0",
        "model/test_processes.py",
        "PerturbX",
    ),
    Mutant(
        "rows-lose-their-order-in-single-screens",
        "effects/_measured.py",
        "return cell, torch.where(unseen, len(self.mean) + 1, row), torch.where(unseen, weight.abs(), weight)",
        "return cell, torch.where(unseen, len(self.mean), row), torch.where(unseen, weight.abs(), weight)",
        "effects/test_measured.py",
        "read_the_same_way",
    ),
    Mutant(
        "members-see-their-fold",
        "module/_perturbx.py",
        "sees = ~self.left_out(context)",
        "sees = ~self.left_out(context) | True",
        "module/test_perturbx.py",
        "fold",
    ),
    Mutant(
        "measured-drugs-predicted-from-themselves",
        "module/_drugaae.py",
        "torch.where(trained, self.left_out[code], features @ self.weight + self.intercept)",
        "features @ self.weight + self.intercept",
        "module/test_drugaae.py",
        "unmeasured",
    ),
    # -- training ---------------------------------------------------------------------------------------------------
    Mutant(
        "size-of-the-data-unknown",
        "train/_plan.py",
        "self.module.n_train = self.n_obs_training or 1",
        "self.module.n_train = 1",
        "train/test_plan.py",
    ),
    Mutant(
        "validation-warms-up",
        "train/_plan.py",
        "self.loss_per_cell(batch, self.max_kl_weight)",
        "self.loss_per_cell(batch, self.kl_weight)",
        "train/test_plan.py",
    ),
    Mutant(
        "small-minibatches-count-as-large",
        "train/_plan.py",
        "total + value * n_cells, seen + n_cells",
        "total + value, seen + 1",
        "train/test_plan.py",
    ),
    Mutant(
        "later-training-starts-over",
        "train/_plan.py",
        "return self.annealed + (1.0 - self.annealed) * done",
        "return done",
        "train/test_plan.py train/test_adversarial.py",
    ),
    Mutant(
        "warm-up-in-epochs-not-fractions",
        "train/_plan.py",
        "max(1, round(self._warmup_fraction * self._n_steps))",
        "1",
        "train/test_plan.py",
    ),
    Mutant(
        "no-gradient-penalty",
        "train/_adversarial.py",
        "self.gradient_penalty * gradient.square().sum(-1).mean()",
        "0.0 * gradient.square().sum(-1).mean()",
        "train/test_adversarial.py",
    ),
    Mutant(
        "one-discriminator-step",
        "train/_adversarial.py",
        "for _ in range(self.n_discriminator_steps):",
        "for _ in range(1):",
        "train/test_adversarial.py",
    ),
    Mutant(
        "adversary-without-warm-up",
        "train/_adversarial.py",
        "return float(min(max((progress - self.warmup_start) / span, 0.0), 1.0))",
        "return 1.0",
        "train/test_adversarial.py",
    ),
    Mutant(
        "free-nats-not-weighed",
        "train/_elbo.py",
        'free * n_cells * float(site["scale"])',
        "free * n_cells",
        "train/test_elbo.py",
    ),
    Mutant(
        "the-wrong-part-waits",
        "train/_alternating.py",
        'if name.startswith(prefixes) == (waiting == "grn"):',
        'if name.startswith(prefixes) != (waiting == "grn"):',
        "train/test_alternating.py",
    ),
    Mutant(
        "validation-cells-trained-on",
        "model/base/_train.py",
        "np.sort(order[:n_train]), np.sort(order[n_train : n_train + n_val])",
        "np.sort(order[:n_train]), np.sort(order[:n_val])",
        TRAINING,
        "early_stopping and PerturbX",
    ),
    Mutant(
        "best-epoch-by-reconstruction",
        "model/base/_train.py",
        '"elbo_validation" if error is None else "prediction_validation"',
        '"elbo_validation"',
        TRAINING,
        "best_prediction and SAMSVAE",
    ),
    Mutant(
        "best-epoch-not-given-back",
        "train/_best.py",
        "value.detach().clone()",
        "value.detach()",
        "train/test_best.py",
    ),
    Mutant(
        "validated-on-training-cells",
        "model/base/_validation.py",
        "asked = cells.at(cells.rows[held_out | (control & ~known)])",
        "asked = cells",
        "model/test_training.py",
        "test_error_of_predictions",
    ),
    Mutant(
        "default-epochs-of-the-preset-alone",
        "model/base/_train.py",
        "max(n_steps, min(n_epochs * n_batches, _MAX_STEPS))",
        "n_epochs * n_batches",
        "model/test_training.py",
        "default_length",
    ),
    # -- baselines --------------------------------------------------------------------------------------------------
    Mutant(
        "temperature-ignored",
        "effects/_contexts.py",
        "weights = np.exp((affinity - affinity.max()) / temperature)",
        "weights = np.exp(affinity - affinity.max())",
        "effects/test_contexts.py baseline/test_closed_form.py",
    ),
    Mutant(
        "nearest-is-farthest",
        "baseline/_estimators.py",
        "nearest = affinity > affinity.max(initial=-np.inf) - 1e-9",
        "nearest = affinity < affinity.min(initial=np.inf) + 1e-9",
        "baseline/test_closed_form.py baseline/test_baseline.py",
    ),
    Mutant(
        "additive-takes-one-member",
        "baseline/_estimators.py",
        "for i in range(len(asked.codes))]",
        "for i in range(1)]",
        "baseline/test_closed_form.py baseline/test_baseline.py",
    ),
    Mutant(
        "convergence-shares-controls",
        "baseline/_estimators.py",
        "fit_convergence(self.conditions, split_controls(self.means, table))",
        "fit_convergence(self.conditions, [(p, e) for (p, _), (_, e) in zip(split_controls(self.means, table), "
        "split_controls(self.means, table)[::-1], strict=True)])",
        "baseline/test_contexts.py",
        "without_convergence",
    ),
    Mutant(
        "few-cells-are-believed",
        "effects/_measured.py",
        "mean[rows] = found.mean * table.spread",
        "mean[rows] = halves.effect * table.spread",
        "baseline/test_contexts.py",
        "few_cells",
    ),
    Mutant(
        "few-shots-are-tested",
        "data/_splits.py",
        "test[own[enough & (place >= numbers[-1])]] = True",
        "test[own[enough & (place >= numbers[0])]] = True",
        "data/test_splits.py",
        "of_a_context_train",
    ),
    Mutant(
        "linear-strength-shares-noise",
        "baseline/_linear.py",
        "zip(*split_controls(self.means, table), strict=True)",
        "zip(*[[p, split_controls(self.means, table)[i][1]] for i, (p, _) in "
        "enumerate(split_controls(self.means, table)[::-1])], strict=True)",
        "baseline/test_linear.py",
        "respond_alike",
    ),
    Mutant(
        "linear-without-ridge",
        "baseline/_linear.py",
        "gram = loading.T @ loading + self.ridge * np.eye(n_components)",
        "gram = loading.T @ loading + 1e-9 * np.eye(n_components)",
        "baseline/test_linear.py baseline/test_closed_form.py",
    ),
    Mutant(
        "mutual-information-against-one-gene",
        "effects/_coexpression.py",
        "return np.sqrt(above**2 + above.T**2)",
        "return above",
        "baseline/test_network.py",
        "correlations",
    ),
    # -- metrics ----------------------------------------------------------------------------------------------------
    Mutant(
        "standard-error-of-perturbed-cells-alone",
        "metrics/_effects.py",
        "np.sqrt(se2[treated] + se2[base])",
        "np.sqrt(se2[treated])",
        "metrics/test_effects.py",
    ),
    Mutant(
        "calibration-ignores-errors-of-measurement",
        "metrics/_effects.py",
        'reach = np.sqrt(sd**2 + table["se"].to_numpy() ** 2)',
        "reach = sd",
        "metrics/test_effects.py",
    ),
    Mutant(
        "reference-ignored",
        "metrics/_response.py",
        "weighted_pearson(x - m, t - m,",
        "weighted_pearson(x, t,",
        "metrics/test_response_metrics.py",
    ),
    Mutant(
        "weights-not-squared",
        "metrics/_response.py",
        "(size - low) / (high - low), 1.0) ** 2",
        "(size - low) / (high - low), 1.0)",
        "metrics/test_response_metrics.py",
    ),
    Mutant(
        "crps-of-few-draws-biased",
        "metrics/_probabilistic.py",
        "(n * (n - 1) if fair else n * n)",
        "(n * n)",
        "metrics/test_probabilistic_metrics.py",
    ),
    Mutant(
        "misses-cost-half",
        "metrics/_probabilistic.py",
        "2.0 / (1.0 - _level(level)) * miss",
        "1.0 / (1.0 - _level(level)) * miss",
        "metrics/test_probabilistic_metrics.py",
    ),
    Mutant(
        "coverage-ignores-errors-of-measurement",
        "metrics/_probabilistic.py",
        "((hi - lo) / 2) ** 2 + (z * se) ** 2",
        "((hi - lo) / 2) ** 2 + (0.0 * z * se) ** 2",
        "metrics/test_probabilistic_metrics.py",
    ),
    Mutant(
        "ties-count-fully",
        "metrics/_conditions.py",
        "return 1.0 - (nearer + tied / 2) / n_others",
        "return 1.0 - (nearer + tied) / n_others",
        "metrics/test_condition_metrics.py",
    ),
    Mutant(
        "ceiling-shares-controls",
        "metrics/_ceiling.py",
        'own, control = halves(control, "control", n_splits, rng)',
        'own = control = halves(control, "control", n_splits, rng)[0]',
        "metrics/test_ceiling.py",
    ),
    Mutant(
        "ceiling-shares-cells",
        "metrics/_ceiling.py",
        "(total - sum_first) / (n - n // 2)",
        "total / n",
        "metrics/test_ceiling.py",
    ),
    Mutant(
        "gap-of-errors-upside-down",
        "metrics/_ceiling.py",
        "model, baseline, ceiling = -model, -baseline, -ceiling",
        "pass",
        "metrics/test_ceiling.py",
    ),
    Mutant(
        "false-discoveries-over-conditions",
        "metrics/_pseudobulk.py",
        'axis=-1, method="bh"',
        'axis=0, method="bh"',
        "metrics/test_evaluate.py",
    ),
    Mutant(
        "network-scored-by-sign",
        "metrics/_network.py",
        "(np.abs(score) if absolute else score)[keep]",
        "score[keep]",
        "metrics/test_network_metrics.py",
    ),
    Mutant(
        "self-loops-are-candidates",
        "metrics/_network.py",
        "keep = sources.to_numpy()[:, None] != sinks.to_numpy()[None, :]",
        "keep = np.ones((len(sources), len(sinks)), dtype=bool)",
        "metrics/test_network_metrics.py",
    ),
    # -- benchmark --------------------------------------------------------------------------------------------------
    Mutant(
        "predictions-start-from-the-reference",
        "benchmark/_controls.py",
        "(_some(sides[0], max_controls, rng), sides[1])",
        "(_some(np.concatenate(sides), max_controls, rng), sides[1])",
        "benchmark/test_runner.py",
        "noise_of_the_controls or divided",
    ),
    Mutant(
        "reference-controls-trained-on",
        "benchmark/_controls.py",
        "np.setdiff1d(split.train, np.concatenate([*own, split.test]))",
        "np.setdiff1d(split.train, split.test)",
        "benchmark/test_runner.py",
        "divided",
    ),
    # -- data and preparation ---------------------------------------------------------------------------------------
    Mutant(
        "library-of-normalized-x-ignored",
        "data/_library.py",
        "if made is not None and made.target_sum is not None and not made.whole:",
        "if False:",
        "data/test_library.py",
    ),
    Mutant(
        "target-sum-of-normalized-x-ignored",
        "data/_library.py",
        "np.round(self.target_sum / unit)",
        "np.round(TARGET_SUM / unit)",
        "data/test_library.py",
    ),
    Mutant(
        "size-factors-ignored",
        "data/_library.py",
        "return _with_share(state, values, kept), values\n    totals",
        "return _with_share(state, kept, kept), kept\n    totals",
        "data/test_library.py",
    ),
    Mutant(
        "held-out-perturbation-trained-in-combinations",
        "data/_splits.py",
        "touched = [name for name, p in parts.items() if p & set(names)]",
        "touched = [name for name, p in parts.items() if p <= set(names)]",
        "data/test_splits.py",
    ),
    Mutant(
        "validation-rows-ignore-the-seed",
        "data/_splits.py",
        'rng = np.random.default_rng(about.pop("val_seed", 0))',
        'rng = np.random.default_rng(0 * about.pop("val_seed", 0))',
        "data/test_splits.py",
    ),
    Mutant(
        "held-out-share-not-stratified",
        "data/_splits.py",
        "return rank < np.minimum(np.rint(fraction * size), size - 1)",
        "return rng.random(len(rank)) < fraction",
        "data/test_splits.py",
    ),
    Mutant(
        "order-of-members-matters",
        "data/_vocabulary.py",
        'return tuple(sorted({part.strip() for part in str(label).split(delimiter)} - {control, ""}))',
        'return tuple(p.strip() for p in str(label).split(delimiter) if p.strip() not in (control, ""))',
        "data/test_vocabulary.py",
    ),
    Mutant(
        "reference-dose-is-the-rarest",
        "data/_vocabulary.py",
        "reference_dose=tuple(float(max(t.index[t == t.max()])) for t in tables)",
        "reference_dose=tuple(float(max(t.index[t == t.min()])) for t in tables)",
        "data/test_vocabulary.py",
    ),
    Mutant(
        "guides-called-without-dominance",
        "pp/_guides.py",
        "called & (fraction > threshold)",
        "called",
        "pp/test_guides.py",
    ),
    Mutant(
        "quality-across-batches",
        "pp/_qc.py",
        "batch = np.zeros(adata.n_obs, dtype=int) if by is None else pd.factorize(adata.obs[by])[0]",
        "batch = np.zeros(adata.n_obs, dtype=int)",
        "pp/test_qc.py",
    ),
    Mutant(
        "quality-thresholds-too-strict",
        "pp/_qc.py",
        "_MAD_TO_SD = 1.4826",
        "_MAD_TO_SD = 1.0",
        "pp/test_qc.py",
    ),
    Mutant(
        "all-processes-train-on-the-same-cells",
        "data/_datamodule.py",
        "parts[rank : len(parts) // world * world : world]",
        "parts[: len(parts) // world * world : world]",
        "model/test_processes.py",
        "SAMSVAE",
    ),
    Mutant(
        "a-model-is-read-before-it-is-written",
        "model/base/_train.py",
        "        if together:\n            torch.distributed.barrier()",
        "",
        "model/test_processes.py",
        "SAMSVAE",
    ),
]


def problems(mutants: Sequence[Mutant] = tuple(MUTANTS)) -> Iterator[str]:
    """What is wrong with the list itself: mutants that do not apply or name tests that are not there."""
    names = [mutant.name for mutant in mutants]
    yield from (f"two mutants are called {name}" for name in sorted({n for n in names if names.count(n) > 1}))
    for mutant in mutants:
        path = SOURCE / "pertura" / mutant.file
        if not path.is_file():
            yield f"mutant {mutant.name} no longer applies: there is no {mutant.file}"
            continue
        try:
            compile(mutant.applied(path.read_text()), mutant.file, "exec")
        except ValueError as error:
            yield str(error)
        except SyntaxError as error:
            yield f"mutant {mutant.name} is no Python: {error}"
        files = [ROOT / "tests" / file for file in mutant.tests.split()]
        yield from (f"mutant {mutant.name}: no {file}" for file in files if not file.is_file())
        # names of tests, and those of the models that the contract is tested with
        named = [*files, ROOT / "tests" / "model" / "conftest.py"]
        text = "".join(file.read_text() for file in named if file.is_file())
        words = set(re.findall(r"\w+", mutant.keyword)) - {"and", "or", "not"}
        yield from (f"mutant {mutant.name}: no test is called {word!r}" for word in sorted(words) if word not in text)


def _run_tests(tree: str, tests: str, keyword: str, log: str) -> None:
    """In a process of its own: the tests, on the source in `tree`; exits as pytest does."""
    import pytest

    os.environ["PYTHONPATH"] = tree
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.path.insert(0, tree)
    os.chdir(ROOT)
    arguments = ["-x", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", "--tb=short"]
    arguments += [f"-k={keyword}"] if keyword else []
    with Path(log).open("w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        code = int(pytest.main([*arguments, *(str(ROOT / "tests" / name) for name in tests.split())]))
    if not Path(sys.modules["pertura"].__file__).is_relative_to(tree):
        code = 99  # something else was tested
    os._exit(code)


def run(mutant: Mutant | None, tests: str, keyword: str, timeout: float) -> tuple[str, str, float]:
    """Run tests on a copy of the source with one change.

    Returns
    -------
    ``"killed"``, ``"survived"`` or what went wrong; the test that failed first; seconds.
    """
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        tree, log = Path(folder) / "src", Path(folder) / "log"
        shutil.copytree(SOURCE, tree)
        if mutant is not None:
            path = tree / "pertura" / mutant.file
            path.write_text(mutant.applied(path.read_text()))
        methods = multiprocessing.get_all_start_methods()
        context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
        process = context.Process(target=_run_tests, args=(str(tree), tests, keyword, str(log)))
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
        text = log.read_text() if log.exists() else ""
    code = process.exitcode
    result = {0: "survived", 1: "killed", 5: "no test selected", 99: "another source was tested"}.get(
        code, f"exit {code}"
    )
    result = "no time left" if code is not None and code < 0 else result
    if result == "survived" and not re.search(r"\d+ passed", text):
        result = "all tests skipped"
    found = re.search(r"^(?:FAILED|ERROR) \S*?tests/(\S+)", text, re.MULTILINE)
    return result, found[1] if found else "", time.monotonic() - start


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what was asked; 1 if a mutant survives that should not, or does not apply."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these mutants alone (parts of names will do)")
    parser.add_argument("--list", action="store_true", help="name the mutants, and whether they apply")
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for each mutant")
    parser.add_argument("--unbroken", action="store_true", help="run the tests on the source as it is: all must pass")
    asked = parser.parse_args(arguments)
    chosen = [m for m in MUTANTS if not asked.only or any(part in m.name for part in asked.only)]
    wrong = list(problems(chosen))
    for line in wrong:
        print(line, file=sys.stderr)
    if asked.list:
        for mutant in chosen:
            print(f"{mutant.name:50s} {mutant.file:28s} {mutant.tests} {mutant.keyword}")
        print(f"{len(chosen)} mutants")
    if asked.list or wrong or not chosen:
        return int(bool(wrong) or not chosen)
    multiprocessing.set_forkserver_preload(PRELOADED)
    if asked.unbroken:
        selections = list(dict.fromkeys((m.tests, m.keyword) for m in chosen))
        jobs: list[tuple[Mutant | None, str, str]] = [(None, *selection) for selection in selections]
    else:
        jobs = [(m, m.tests, m.keyword) for m in chosen]
    expected, failed, counts = "survived" if asked.unbroken else "killed", 0, {"killed": 0, "argued": 0}
    with ThreadPoolExecutor(max(1, asked.jobs)) as pool:
        for (mutant, tests, keyword), (result, test, seconds) in zip(
            jobs, pool.map(lambda job: run(*job, asked.timeout), jobs), strict=True
        ):
            name = f"{tests} {keyword}" if mutant is None else mutant.name
            argued = mutant is not None and bool(mutant.survives) and result == "survived"
            counts["killed"] += result == expected
            counts["argued"] += argued
            failed += result != expected and not argued
            said = f"survives: {mutant.survives}" if argued else "passed" if mutant is None and not test else result
            print(f"{name:50s} {said:10s} {seconds:5.0f} s  {test}", flush=True)
    print(f"{counts['killed']} of {len(jobs)} {expected}, {counts['argued']} argued, {failed} to mend")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
