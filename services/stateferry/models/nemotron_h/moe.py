"""Nemotron-H's mixture of experts: routed experts, in fewer features if so built, and a shared one.

x -> router -> experts and weights
x -> fc1 -> experts, weighted and summed -> fc2
y = that + shared expert(x)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from stateferry.models.layers.experts import Experts
from stateferry.models.layers.mlp import Relu2Mlp, relu2_mlp
from stateferry.models.layers.routers import SigmoidRouter
from stateferry.models.nemotron_h.config import MoeSizes
from stateferry.models.step import Step
from stateferry.models.weights import Part, WeightTable

_FP32 = torch.float32


@dataclass(frozen=True, slots=True)
class Projection:
    weight: torch.Tensor
    bias: torch.Tensor | None

    def __call__(self, x: torch.Tensor, step: Step) -> torch.Tensor:
        return step.kernels.linear(x, self.weight, self.bias)


@dataclass(frozen=True, slots=True)
class NemotronMoe:
    router: SigmoidRouter
    experts: Experts
    shared: Relu2Mlp

    def __call__(self, x: torch.Tensor, step: Step) -> torch.Tensor:
        """x (num_rows, d_model) -> (num_rows, d_model)."""
        return self.experts(x, *self.router(x, step), step) + self.shared(x, step)


@dataclass(frozen=True, slots=True)
class LatentMoe:
    """The routed experts see a projection to fewer features."""

    fc1: Projection
    fc2: Projection
    router: SigmoidRouter
    experts: Experts
    shared: Relu2Mlp

    def __call__(self, x: torch.Tensor, step: Step) -> torch.Tensor:
        """x (num_rows, d_model) -> (num_rows, d_model)."""
        latent = self.experts(self.fc1(x, step), *self.router(x, step), step)
        return self.fc2(latent, step) + self.shared(x, step)


def nemotron_moe(
    table: WeightTable, prefix: str, d_model: int, sizes: MoeSizes
) -> NemotronMoe | LatentMoe:
    """Declare the weights under ``prefix``."""
    router = SigmoidRouter(
        weight=table.whole(f"{prefix}.gate.weight", (sizes.experts, d_model), dtype=_FP32),
        correction=table.whole(
            f"{prefix}.gate.e_score_correction_bias", (sizes.experts,), dtype=_FP32
        ),
        top_k=sizes.top_k,
        num_groups=sizes.num_groups,
        top_groups=sizes.top_groups,
        normalize=sizes.normalize,
        scale=sizes.scale,
    )
    experts = _experts(table, f"{prefix}.experts", sizes)
    shared = relu2_mlp(
        table, f"{prefix}.shared_experts", d_model, sizes.shared_intermediate, sizes.bias
    )
    if sizes.width == d_model:
        return NemotronMoe(router, experts, shared)

    def projection(name: str, outputs: int, inputs: int) -> Projection:
        return Projection(
            weight=table.whole(f"{prefix}.{name}.weight", (outputs, inputs)),
            bias=table.whole(f"{prefix}.{name}.bias", (outputs,)) if sizes.bias else None,
        )

    fc1 = projection("fc1_latent_proj", sizes.width, d_model)
    fc2 = projection("fc2_latent_proj", d_model, sizes.width)
    return LatentMoe(fc1, fc2, router, experts, shared)


def _experts(table: WeightTable, prefix: str, sizes: MoeSizes) -> Experts:
    """Files hold them one by one; what a program saves of its memory holds them in one piece."""

    def both(name: str, outputs: int, inputs: int) -> torch.Tensor:
        return table.tensor(
            (sizes.experts, outputs, inputs),
            [Part(f"{prefix}.{e}.{name}.weight", (e,)) for e in range(sizes.experts)],
            [Part(f"{prefix}.{name}")],
        )

    up = both("up_proj", sizes.intermediate, sizes.width)
    down = both("down_proj", sizes.width, sizes.intermediate)
    return Experts(
        tuple(Relu2Mlp(u, None, d, None) for u, d in zip(up.unbind(), down.unbind(), strict=True))
    )
