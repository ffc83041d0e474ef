"""Which genes a drug may hit: scores from the network, from vectors of drugs, from the targets of similar drugs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from ._engine import Question, encode

if TYPE_CHECKING:
    from pertura.module._drugaae import DrugAAE as Module

_SHARPNESS = 10.0  # of a neighbour's weight, exp of this times its similarity


class TargetMixin:
    """Target scores of a model that reads descriptions."""

    module: Module

    def get_drug_target_scores(
        self,
        perturbation: str | list[str] | None = None,
        *,
        method: Literal["network", "signature", "neighbors"] = "network",
        dose: float | None = None,
        damping: float = 0.5,
        n_steps: int = 3,
        known_targets: pd.DataFrame | None = None,
    ) -> pd.DataFrame:
        """Genes ranked as targets of drugs.

        Scores, not probabilities: compare them with the popularity of targets and their degree in the network.

        Parameters
        ----------
        perturbation
            Names; `None`: all trained ones.
        method
            ``"network"``: predicted absolute effect of a gene's neighbourhood in the network, in units of what all drugs do
            there; ``"signature"``: similarity of the drug's vector to that of a signature in which the gene alone is changed;
            ``"neighbors"``, which needs `known_targets`: how often the gene is a target of other drugs, those with similar
            descriptions counting more (popularity, where descriptions say nothing).
        dose
            In the registered unit.
        damping, n_steps
            Of the walk over the network: chance to go on, and number of steps.
        known_targets
            Targets of some drugs, drugs x genes, 1 or 0 (or `bool`). A drug's own row never enters its score.

        Returns
        -------
        DataFrame, perturbations x genes; the higher, the more likely a target.
        """
        if method not in ("network", "signature", "neighbors"):
            raise ValueError(f"`method` must be 'network', 'signature' or 'neighbors', got {method!r}.")
        if (known_targets is None) == (method == "neighbors"):
            raise ValueError("`known_targets` belongs to `method='neighbors'`, which needs it. Give both or neither.")
        self._check_if_trained(warn=False, message="The model is not trained. Call `train()` first.")
        names = list(self._discrepancy.trained) if perturbation is None else perturbation
        questions = self._questions(names, dose)
        labels = [q.label for q in questions]
        if method == "neighbors":
            score = self._by_neighbors(labels, known_targets)
        else:
            score = self._by_network(questions, damping, n_steps) if method == "network" else self._by_signature(labels)
        return pd.DataFrame(score, index=pd.Index(labels, name="perturbation"), columns=self.gene_names)

    @torch.no_grad()
    def _by_network(self, questions: list[Question], damping: float, n_steps: int) -> NDArray[np.float32]:
        genes, module = self.module.genes, self.module
        effect = torch.as_tensor(self._linear_effects(questions)).abs().to(module.features.device)
        every = module.effects[module.observed].mean(1) @ module.basis.mT
        unit = every.abs().mean(0) if len(every) and module.n_effect else effect.mean(0)
        value = (effect / (unit + 0.1 * unit.mean() + 1e-9)).mT
        total = step = value
        degree = torch.ones(len(value), device=value.device)
        spread = degree
        if len(genes.weights):
            for i in range(1, n_steps + 1):
                step, degree = genes.propagate(step), genes.propagate(degree[:, None])[:, 0]
                total, spread = total + damping**i * step, spread + damping**i * degree
        # a gene with many neighbours collects much of everything: in units of what it would collect of a constant
        return (total / spread[:, None]).mT.cpu().numpy().astype(np.float32)

    @torch.no_grad()
    def _linear_effects(self, questions: list[Question]) -> NDArray[np.float32]:
        """Mean predicted effect of each question over some control cells, of the model or of an average context."""
        module = self.module
        result = []
        for question in questions:
            action = encode(self.vocabulary, question).to(module.features.device)
            contexts = torch.arange(module.n_contexts, device=module.features.device)
            n = len(contexts)
            wide = type(action)(
                action.codes.expand(n, -1),
                action.dose.expand(n, -1),
                None if action.features is None else action.features.expand(n, -1, -1),
            )
            shift, effect = module.describe(wide, contexts)
            q = module.decoder_out(module.decoder(module._with_batch(shift, torch.zeros_like(contexts))))
            zero = module.decoder_out(
                module.decoder(module._with_batch(torch.zeros_like(shift), torch.zeros_like(contexts)))
            )
            added = (q - zero) @ module.genes().mT
            if module.native_scale != "counts":
                added = added * module.likelihood.unit
            result.append((added + effect @ module.basis.mT).mean(0).cpu().numpy())
        return np.stack(result)

    @torch.no_grad()
    def _by_signature(self, labels: list[str]) -> NDArray[np.float32]:
        module = self.module
        table = self.get_drug_embedding()
        v = torch.as_tensor(table.loc[labels].drop(columns="trained").to_numpy(np.float32)).to(module.features.device)
        knocked = module.drugs.read_signature(-5.0 * torch.eye(module.n_genes, device=v.device), module.genes())
        similarity = torch.nn.functional.normalize(v, dim=-1) @ torch.nn.functional.normalize(knocked, dim=-1).mT
        return similarity.abs().cpu().numpy()

    def _by_neighbors(self, labels: list[str], known: pd.DataFrame) -> NDArray[np.float32]:
        names, unit = self._unit_descriptions()
        lookup = {name: i for i, name in enumerate(names)}
        rows = [n for n in known.index.astype(str) if n in lookup]
        absent = [n for n in labels if n not in lookup]
        if not rows or absent:
            what = f"no drug of `known_targets` (first: {list(known.index[:3])})" if not rows else f"not {absent[:3]}"
            raise ValueError(f"`method='neighbors'` compares descriptions of single drugs; the model has {what}.")
        target = known.set_axis(known.index.astype(str)).reindex(columns=self.gene_names).fillna(0).loc[rows]
        similarity = unit[[lookup[n] for n in labels]] @ unit[[lookup[n] for n in rows]].T
        weight = np.exp(_SHARPNESS * similarity) * (np.array(labels)[:, None] != np.array(rows))
        score = weight @ target.to_numpy(np.float64) / np.maximum(weight.sum(1, keepdims=True), 1e-12)
        return score.astype(np.float32)
