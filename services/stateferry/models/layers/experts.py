"""A mixture of experts: each row goes to the few that a router chose for it.

Row-independent: an expert sees the rows gathered for it through ``linear``, and every row adds its
experts up in ascending order of their numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from stateferry.models.step import Step


class Router(Protocol):
    """x (num_rows, d_model) -> expert numbers int64 and weights fp32, both (num_rows, top_k)."""

    def __call__(self, x: torch.Tensor, step: Step) -> tuple[torch.Tensor, torch.Tensor]: ...


Expert = Callable[[torch.Tensor, Step], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Experts:
    """All experts of a layer; each takes and gives rows of one width."""

    experts: tuple[Expert, ...]

    def __call__(
        self, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, step: Step
    ) -> torch.Tensor:
        """x (num_rows, width) -> (num_rows, width), each row the weighted sum of its experts."""
        num_rows, top_k = chosen.shape
        chosen, order = chosen.sort(dim=1)
        weights = weights.gather(1, order)
        by_expert = chosen.flatten().argsort(stable=True)
        gathered = x[by_expert // top_k]
        outputs = torch.empty_like(gathered)
        counts = torch.bincount(chosen.flatten(), minlength=len(self.experts)).tolist()
        done = 0
        for expert, count in zip(self.experts, counts, strict=True):
            if count:
                output = expert(gathered[done : done + count], step)
                outputs[by_expert[done : done + count]] = output
                done += count
        terms = outputs.view(num_rows, top_k, -1).float() * weights[..., None]
        total = terms[:, 0]
        for number in range(1, top_k):
            total = total + terms[:, number]
        return total.to(x.dtype)
