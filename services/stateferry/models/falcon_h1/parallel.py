"""Falcon-H1's mixer: Mamba-2 and attention side by side on the same input, their outputs added.

in_proj -> z | xBC | dt | q | k | v
z, xBC, dt -> Mamba-2 -> y
q, k, v -> attention -> a
y | a -> out_proj

Both branches' projections are one product each: their weights lie below, and beside, each other.
The multipliers are in the weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from stateferry.models.falcon_h1.config import FalconH1Config, Multipliers
from stateferry.models.layers.attention import AttentionCore, qkv_parts
from stateferry.models.layers.mixer import MixerCore
from stateferry.models.sizes import MixerSizes
from stateferry.models.step import Step
from stateferry.models.weights import Part, WeightTable


@dataclass(frozen=True, slots=True)
class ParallelMixer:
    mamba: MixerCore
    attention: AttentionCore
    widths: list[int]  # of z, xBC, dt, and q, k and v together
    in_proj: torch.Tensor  # (sum of widths, d_model)
    in_bias: torch.Tensor | None
    out_proj: torch.Tensor  # (d_model, d_inner + q_dim)
    out_bias: torch.Tensor | None

    def __call__(self, x: torch.Tensor, step: Step) -> torch.Tensor:
        """x (num_rows, d_model) -> (num_rows, d_model). Mutates the layer's state and pages."""
        linear = step.kernels.linear
        projected = linear(x, self.in_proj, self.in_bias)
        z, xBC, dt, qkv = projected.split_with_sizes(self.widths, 1)
        both = torch.cat((self.mamba(z, xBC, dt, step), self.attention(qkv, step)), 1)
        return linear(both, self.out_proj, self.out_bias)


def parallel_mixer(
    table: WeightTable,
    prefix: str,
    config: FalconH1Config,
    mamba: MixerCore,
    attention: AttentionCore,
) -> ParallelMixer:
    """Declare the projections of ``prefix``.mamba and ``prefix``.self_attn."""
    mixer, heads, by = config.mixer, config.attention, config.multipliers
    projected = mixer.projected + heads.projected
    outputs = mixer.d_inner + heads.q_dim
    ssm, attn = f"{prefix}.mamba", f"{prefix}.self_attn"
    per_row = _per_row(mixer, by)

    def mamba_in(kind: str, scale: float) -> Part:
        return Part(f"{ssm}.in_proj.{kind}", (slice(0, mixer.projected),), scale * per_row)

    def attention_in(kind: str, scale: float) -> list[Part]:
        first = mixer.projected
        return qkv_parts(attn, kind, heads, first_row=first, scale=scale, key_scale=by.key)

    in_biases = [mamba_in("bias", 1.0)] * mixer.in_bias
    in_biases += attention_in("bias", 1.0) if heads.bias else []
    out_biases = [Part(f"{ssm}.out_proj.bias", scale=by.ssm_out, accumulate=True)] * mixer.out_bias
    out_biases += [
        Part(f"{attn}.o_proj.bias", scale=by.attention_out, accumulate=True)
    ] * heads.bias
    beside = slice(mixer.d_inner, outputs)
    return ParallelMixer(
        mamba=mamba,
        attention=attention,
        widths=[mixer.d_inner, mixer.conv_dim, mixer.nheads, heads.projected],
        in_proj=table.projection(
            (projected, config.d_model),
            [mamba_in("weight", by.ssm_in), *attention_in("weight", by.attention_in)],
        ),
        in_bias=table.tensor((projected,), in_biases) if in_biases else None,
        out_proj=table.projection(
            (config.d_model, outputs),
            [
                Part(f"{ssm}.out_proj.weight", (slice(None), slice(mixer.d_inner)), by.ssm_out),
                Part(f"{attn}.o_proj.weight", (slice(None), beside), by.attention_out),
            ],
        ),
        out_bias=table.tensor((config.d_model,), out_biases) if out_biases else None,
    )


def _per_row(sizes: MixerSizes, by: Multipliers) -> torch.Tensor:
    """(projected,) fp32: what each row of zxbcdt is multiplied by."""
    widths = [sizes.d_inner, sizes.d_inner, sizes.bc_dim, sizes.bc_dim, sizes.nheads]
    return torch.tensor(by.zxbcdt).repeat_interleave(torch.tensor(widths))
