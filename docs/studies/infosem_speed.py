"""Time of an epoch of InfoSEM, against the same model with a dense inverse of genes x genes.

Random expression; both start at the same parameters and see the same minibatches of 64 cells.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from _common import parser, show, start
from pyro.infer import TraceMeanField_ELBO
from torch import Tensor

from pertura.module import Action, Cells, InfoSEM

BATCH = 64


class Dense(InfoSEM):
    """The same model, with the inverse of the matrix of all genes in every step."""

    def _full(self, weight: Tensor) -> Tensor:
        full = weight.new_zeros(len(weight), self.n_genes, self.n_genes).index_copy(1, self.regulators, weight)
        return torch.eye(self.n_genes, device=weight.device) - full

    def regulated(self, z: Tensor, weight: Tensor) -> Tensor:
        """State of all genes."""
        return z @ torch.linalg.inv(self._full(weight))

    def unregulated(self, x: Tensor, weight: Tensor) -> Tensor:
        """What the network does not explain."""
        return x @ self._full(weight)


def study(n_genes: Sequence[int], *, n_regulators: int = 300, n_cells: int = 1024, n_steps: int = 3) -> pd.DataFrame:
    """One row per number of genes; of the dense model of more than 3,000 genes one step is timed, and none left out before it."""
    rows = []
    for n in n_genes:
        generator = torch.Generator().manual_seed(0)
        batches = [torch.randn(BATCH, n, generator=generator) for _ in range(n_steps + 1)]
        took, models = {}, {}
        for cls in (InfoSEM, Dense):
            torch.manual_seed(0)
            regulators = np.arange(min(n_regulators, n))
            module = cls(n, 1, regulators=regulators, knocked_out=np.zeros(0, np.int64), alpha=0.12 * n)
            module.n_train, models[cls] = n_cells, module
            many = cls is InfoSEM or n <= 3000
            took[cls] = seconds_per_step(module, batches if many else batches[:1], warm=many) * n_cells / BATCH
        with torch.no_grad():
            weight = models[InfoSEM].network()
            expected = models[Dense].regulated(batches[0][None], weight)
            difference = (
                models[InfoSEM].regulated(batches[0][None], weight) - expected
            ).abs().max() / expected.abs().max()
        row = {"n_genes": n, "seconds_per_epoch": took[InfoSEM], "seconds_per_epoch_dense": took[Dense]}
        rows.append({**row, "faster": took[Dense] / took[InfoSEM], "max_difference": float(difference)})
    return pd.DataFrame(rows)


def seconds_per_step(module: InfoSEM, batches: Sequence[Tensor], *, warm: bool) -> float:
    """Mean over the minibatches, without the first if `warm`."""
    elbo, optimizer = TraceMeanField_ELBO(), torch.optim.Adam(module.parameters(), lr=1e-4)
    began = time.perf_counter()
    for i, x in enumerate(batches):
        if warm and i == 1:
            began = time.perf_counter()
        module.on_step(1.0)
        optimizer.zero_grad()
        none = torch.zeros(len(x), 1)
        cells = Cells(x, Action(none.long() - 1, none), none[:, 0].long(), none[:, 0].long(), none + 1)
        elbo.differentiable_loss(module.model, module.guide, cells, x=x[None]).backward()
        optimizer.step()
    return (time.perf_counter() - began) / max(1, len(batches) - int(warm))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the study."""
    words = parser(__doc__, seeds=1)
    words.add_argument("--genes", nargs="+", type=int, default=[800, 2000, 5000])
    show(study(start(words, argv).genes))


if __name__ == "__main__":
    main()
