"""How a mixture of experts chooses: per row, by operations whose bits depend on that row alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from stateferry.models.step import Step


@dataclass(frozen=True, slots=True)
class SoftmaxRouter:
    """The experts of the largest logits, weighted by their softmax."""

    weight: torch.Tensor  # (num_experts, d_model)
    top_k: int

    def __call__(self, x: torch.Tensor, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
        """x (num_rows, d_model) -> expert numbers int64 and weights fp32, (num_rows, top_k)."""
        logits = step.kernels.linear(x, self.weight, None).float()
        best, chosen = logits.topk(self.top_k, dim=1)
        odds = torch.exp(best - best[:, :1])
        return chosen, odds / _sum(odds)


@dataclass(frozen=True, slots=True)
class SigmoidRouter:
    """Experts by their sigmoid and a correction that only the choice sees, out of the groups whose
    two best experts are the best."""

    weight: torch.Tensor  # (num_experts, d_model) fp32
    correction: torch.Tensor  # (num_experts,) fp32
    top_k: int
    num_groups: int
    top_groups: int
    normalize: bool
    scale: float

    def __call__(self, x: torch.Tensor, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
        """x (num_rows, d_model) -> expert numbers int64 and weights fp32, (num_rows, top_k)."""
        logits = step.kernels.linear(x.float(), self.weight, None)
        scores = 1.0 / (1.0 + torch.exp(-logits))
        merits = scores + self.correction
        if self.top_groups < self.num_groups:
            merits = self._of_best_groups(merits)
        chosen = merits.topk(self.top_k, dim=1).indices
        weights = scores.gather(1, chosen)
        if self.normalize:
            weights = weights / (_sum(weights) + 1e-20)
        return chosen, weights * self.scale

    def _of_best_groups(self, merits: torch.Tensor) -> torch.Tensor:
        groups = merits.view(merits.shape[0], self.num_groups, -1)
        pairs = groups.topk(2, dim=2).values
        best = (pairs[..., 0] + pairs[..., 1]).topk(self.top_groups, dim=1).indices
        out = torch.ones(groups.shape[:2], dtype=torch.bool, device=merits.device)
        out.scatter_(1, best, False)
        return groups.masked_fill(out[..., None], -torch.inf).flatten(1)


def _sum(rows: torch.Tensor) -> torch.Tensor:
    """(num_rows, n) -> (num_rows, 1), from left to right: a reduction may take another order when
    there are more rows."""
    return rows.cumsum(1)[:, -1:]
