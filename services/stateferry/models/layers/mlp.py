"""Feed-forward layers: up, activation, down."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from stateferry.models.step import Step
from stateferry.models.weights import Part, WeightTable


@dataclass(frozen=True, slots=True)
class Relu2Mlp:
    """relu(up x)^2, then down."""

    up_proj: torch.Tensor  # (intermediate, d_model)
    up_bias: torch.Tensor | None
    down_proj: torch.Tensor  # (d_model, intermediate)
    down_bias: torch.Tensor | None

    def __call__(self, x: torch.Tensor, step: Step) -> torch.Tensor:
        """x (num_rows, d_model) -> (num_rows, d_model)."""
        kernels = step.kernels
        up = kernels.linear(x, self.up_proj, self.up_bias)
        return kernels.linear(kernels.relu2(up), self.down_proj, self.down_bias)


@dataclass(frozen=True, slots=True)
class GatedMlp:
    """silu(gate x) * (up x), then down."""

    halves: list[int]  # features of gate and up
    gate_up_proj: torch.Tensor  # (2 * intermediate, d_model), the gate first
    gate_up_bias: torch.Tensor | None
    down_proj: torch.Tensor  # (d_model, intermediate)
    down_bias: torch.Tensor | None

    def __call__(self, x: torch.Tensor, step: Step) -> torch.Tensor:
        """x (num_rows, d_model) -> (num_rows, d_model)."""
        kernels = step.kernels
        gate_up = kernels.linear(x, self.gate_up_proj, self.gate_up_bias)
        gate, up = gate_up.split_with_sizes(self.halves, 1)
        return kernels.linear(kernels.silu_mul(gate, up), self.down_proj, self.down_bias)


def relu2_mlp(
    table: WeightTable, prefix: str, d_model: int, intermediate: int, bias: bool
) -> Relu2Mlp:
    """Declare up_proj and down_proj under ``prefix``."""
    return Relu2Mlp(
        up_proj=table.projection((intermediate, d_model), [Part(f"{prefix}.up_proj.weight")]),
        up_bias=table.whole(f"{prefix}.up_proj.bias", (intermediate,)) if bias else None,
        down_proj=table.projection((d_model, intermediate), [Part(f"{prefix}.down_proj.weight")]),
        down_bias=table.whole(f"{prefix}.down_proj.bias", (d_model,)) if bias else None,
    )


def gated_mlp(
    table: WeightTable,
    prefix: str,
    d_model: int,
    intermediate: int,
    bias: bool,
    *,
    gate_scale: float = 1.0,
    down_scale: float = 1.0,
) -> GatedMlp:
    """Declare gate_proj, up_proj and down_proj under ``prefix``. The scales are multiplied in."""
    both = 2 * intermediate

    def gate_up(kind: str) -> list[Part]:
        return [
            Part(f"{prefix}.gate_proj.{kind}", (slice(0, intermediate),), gate_scale),
            Part(f"{prefix}.up_proj.{kind}", (slice(intermediate, both),)),
        ]

    def down(kind: str) -> list[Part]:
        return [Part(f"{prefix}.down_proj.{kind}", scale=down_scale)]

    return GatedMlp(
        halves=[intermediate, intermediate],
        gate_up_proj=table.projection((both, d_model), gate_up("weight")),
        gate_up_bias=table.tensor((both,), gate_up("bias")) if bias else None,
        down_proj=table.projection((d_model, intermediate), down("weight")),
        down_bias=table.tensor((d_model,), down("bias")) if bias else None,
    )
