"""Granite's feed-forward: a SwiGLU for every token, and SwiGLU experts that are chosen for it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from stateferry.models.granite_hybrid.config import MoeSizes
from stateferry.models.layers.experts import Experts
from stateferry.models.layers.mlp import GatedMlp
from stateferry.models.layers.routers import SoftmaxRouter
from stateferry.models.step import Step
from stateferry.models.weights import Part, WeightTable


@dataclass(frozen=True, slots=True)
class GraniteMoe:
    router: SoftmaxRouter
    experts: Experts
    shared: GatedMlp

    def __call__(self, x: torch.Tensor, step: Step) -> torch.Tensor:
        """x (num_rows, d_model) -> (num_rows, d_model)."""
        return self.experts(x, *self.router(x, step), step) + self.shared(x, step)


def shared_mlp(table: WeightTable, prefix: str, d_model: int, intermediate: int) -> GatedMlp:
    """Declare the MLP under ``prefix``, which is stored with gate and up in one piece."""
    return GatedMlp(
        halves=[intermediate, intermediate],
        gate_up_proj=table.whole(f"{prefix}.input_linear.weight", (2 * intermediate, d_model)),
        gate_up_bias=None,
        down_proj=table.whole(f"{prefix}.output_linear.weight", (d_model, intermediate)),
        down_bias=None,
    )


def granite_moe(
    table: WeightTable, prefix: str, d_model: int, sizes: MoeSizes, shared: GatedMlp
) -> GraniteMoe:
    """Declare router and experts under ``prefix``."""
    gate_up = _stacked(
        table,
        prefix,
        "input_linear",
        "gate_up_proj",
        sizes.experts,
        2 * sizes.intermediate,
        d_model,
    )
    down = _stacked(
        table, prefix, "output_linear", "down_proj", sizes.experts, d_model, sizes.intermediate
    )
    weight = table.tensor(
        (sizes.experts, d_model),
        [Part(f"{prefix}.router.layer.weight")],
        [Part(f"{prefix}.router.weight")],
    )
    experts = tuple(
        GatedMlp([sizes.intermediate] * 2, one_gate_up, None, one_down, None)
        for one_gate_up, one_down in zip(gate_up.unbind(), down.unbind(), strict=True)
    )
    return GraniteMoe(SoftmaxRouter(weight, sizes.top_k), Experts(experts), shared)


def _stacked(
    table: WeightTable,
    prefix: str,
    filed: str,
    in_memory: str,
    experts: int,
    outputs: int,
    inputs: int,
) -> torch.Tensor:
    """All experts' weights in one piece, under the files' name or the library's own."""
    return table.tensor(
        (experts, outputs, inputs),
        [Part(f"{prefix}.{filed}.weight")],
        [Part(f"{prefix}.experts.{in_memory}")],
    )
