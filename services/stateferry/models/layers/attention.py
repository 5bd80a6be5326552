"""Causal grouped-query attention over paged keys and values.

qkv_proj -> q | k | v
q, k -> rotation by position, where the model has it
(q, k, v) -> attention -> o_proj
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from stateferry.models.layers.rotary import RotaryTable
from stateferry.models.sizes import AttentionSizes
from stateferry.models.step import Step
from stateferry.models.weights import Part, WeightTable


@dataclass(frozen=True, slots=True)
class AttentionCore:
    """What lies between the projections. ``rotary`` is None in a model without positions."""

    sizes: AttentionSizes
    index: int  # among the model's attention layers
    rotary: RotaryTable | None

    def __call__(self, qkv: torch.Tensor, step: Step) -> torch.Tensor:
        """qkv (num_rows, projected) -> (num_rows, q_dim), valid until the next attention layer
        runs. Writes k and v into the sequences' pages."""
        sizes = self.sizes
        heads = qkv.view(-1, sizes.all_heads, sizes.head_dim)
        if self.rotary is None:
            q, k, v = heads.split_with_sizes([sizes.heads, sizes.kv_heads, sizes.kv_heads], 1)
        else:
            qk, v = heads.split_with_sizes([sizes.heads + sizes.kv_heads, sizes.kv_heads], 1)
            turned = self.rotary.rotate(qk, step)
            q, k = turned.split_with_sizes([sizes.heads, sizes.kv_heads], 1)
        attended = step.attended(sizes, qkv.dtype)
        step.attend(q, k, v, layer=self.index, scale=sizes.scale, out=attended.heads)
        return attended.rows


@dataclass(frozen=True, slots=True)
class Attention:
    """An attention layer with projections of its own."""

    core: AttentionCore
    qkv_proj: torch.Tensor  # (projected, d_model)
    qkv_bias: torch.Tensor | None
    o_proj: torch.Tensor  # (d_model, q_dim)
    o_bias: torch.Tensor | None

    def __call__(self, x: torch.Tensor, step: Step) -> torch.Tensor:
        """x (num_rows, d_model) -> (num_rows, d_model). Mutates the layer's pages."""
        linear = step.kernels.linear
        attended = self.core(linear(x, self.qkv_proj, self.qkv_bias), step)
        return linear(attended, self.o_proj, self.o_bias)


def attention(
    table: WeightTable,
    prefix: str,
    index: int,
    d_model: int,
    sizes: AttentionSizes,
    rotary: RotaryTable | None,
) -> Attention:
    """Declare a layer whose weights have the usual names under ``prefix``."""
    return Attention(
        core=AttentionCore(sizes, index, rotary),
        qkv_proj=table.projection((sizes.projected, d_model), qkv_parts(prefix, "weight", sizes)),
        qkv_bias=table.tensor((sizes.projected,), qkv_parts(prefix, "bias", sizes))
        if sizes.bias
        else None,
        o_proj=table.projection((d_model, sizes.q_dim), [Part(f"{prefix}.o_proj.weight")]),
        o_bias=table.whole(f"{prefix}.o_proj.bias", (d_model,)) if sizes.bias else None,
    )


def qkv_parts(
    prefix: str,
    kind: str,
    sizes: AttentionSizes,
    *,
    first_row: int = 0,
    scale: float = 1.0,
    key_scale: float = 1.0,
) -> list[Part]:
    """q, k and v below each other, from ``first_row`` on; ``kind`` is weight or bias."""
    k = first_row + sizes.q_dim
    v = k + sizes.kv_dim
    end = v + sizes.kv_dim
    return [
        Part(f"{prefix}.q_proj.{kind}", (slice(first_row, k),), scale),
        Part(f"{prefix}.k_proj.{kind}", (slice(k, v),), scale * key_scale),
        Part(f"{prefix}.v_proj.{kind}", (slice(v, end),), scale),
    ]
