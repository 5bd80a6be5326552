"""A pre-norm residual block: residual += layer(norm(residual)). Every model is a stack of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from stateferry.models.step import Step


class Layer(Protocol):
    """x (num_rows, d_model) -> (num_rows, d_model), mutating the step's caches if it has any."""

    def __call__(self, x: torch.Tensor, step: Step) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class Block:
    """``norm`` is fp32 where a model weights in fp32 and rounds once, else of the activation dtype,
    in which the weighted value is rounded a second time."""

    norm: torch.Tensor  # (d_model,)
    layer: Layer
