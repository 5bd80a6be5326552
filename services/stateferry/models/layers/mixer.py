"""The Mamba-2 mixer.

in_proj -> z | xBC | dt
xBC -> causal convolution, SiLU -> x | B | C
(x, dt, B, C) -> state space model -> y
y, z -> gate and norm -> out_proj
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from stateferry.models.sizes import MixerSizes
from stateferry.models.step import Step
from stateferry.models.weights import Part, WeightTable
from stateferry_kernels.layer_state import ConvParams, SsmLayerParams
from stateferry_kernels.operations import GatedNorm, Kernels

_FP32 = torch.float32


@dataclass(frozen=True, slots=True)
class GateAndNorm:
    """y and z to the mixer's output, by one kernel: gate then norm, or norm then gate."""

    apply: GatedNorm
    weight: torch.Tensor  # (d_inner,)
    eps: float
    group_size: int


@dataclass(frozen=True, slots=True)
class MixerCore:
    """What lies between the projections. ``norm`` is None where a model only gates."""

    sizes: MixerSizes
    index: int  # among the model's mixers
    conv: ConvParams
    ssm: SsmLayerParams
    norm: GateAndNorm | None

    def __call__(
        self, z: torch.Tensor, xBC: torch.Tensor, dt: torch.Tensor, step: Step
    ) -> torch.Tensor:
        """z (num_rows, d_inner), xBC (num_rows, conv_dim), dt (num_rows, nheads) ->
        (num_rows, d_inner), valid until the next mixer runs. Mutates the layer's state."""
        norm = self.norm
        rows = step.mixer_rows(self.sizes, xBC.dtype)
        step.conv(xBC, self.conv, self.index, rows)
        if norm is None:
            step.ssm(rows, dt, self.ssm, self.index, z.view(rows.y_heads.shape))
            return rows.y
        step.ssm(rows, dt, self.ssm, self.index, None)
        return norm.apply(rows.y, z, norm.weight, norm.eps, norm.group_size)


@dataclass(frozen=True, slots=True)
class Mamba2Mixer:
    """A mixer with projections of its own."""

    core: MixerCore
    widths: list[int]  # of z, xBC and dt
    in_proj: torch.Tensor  # (projected, d_model)
    in_bias: torch.Tensor | None
    out_proj: torch.Tensor  # (d_model, d_inner)
    out_bias: torch.Tensor | None

    def __call__(self, x: torch.Tensor, step: Step) -> torch.Tensor:
        """x (num_rows, d_model) -> (num_rows, d_model). Mutates the layer's state."""
        linear = step.kernels.linear
        zxbcdt = linear(x, self.in_proj, self.in_bias)
        z, xBC, dt = zxbcdt.split_with_sizes(self.widths, 1)
        return linear(self.core(z, xBC, dt, step), self.out_proj, self.out_bias)


def gate_then_norm(
    table: WeightTable, prefix: str, sizes: MixerSizes, kernels: Kernels
) -> GateAndNorm:
    """The gated norm of the Mamba-2 paper."""
    weight = table.whole(f"{prefix}.norm.weight", (sizes.d_inner,))
    return GateAndNorm(kernels.gated_rms_norm, weight, sizes.norm_eps, sizes.group_size)


def norm_then_gate(
    table: WeightTable, prefix: str, sizes: MixerSizes, kernels: Kernels
) -> GateAndNorm:
    """For models trained with ``norm_before_gate``."""
    weight = table.whole(f"{prefix}.norm.weight", (sizes.d_inner,))
    return GateAndNorm(kernels.norm_then_gate, weight, sizes.norm_eps, sizes.group_size)


def mixer_core(
    table: WeightTable, prefix: str, index: int, sizes: MixerSizes, norm: GateAndNorm | None
) -> MixerCore:
    """Declare the weights under ``prefix``."""
    heads = (sizes.nheads,)
    return MixerCore(
        sizes=sizes,
        index=index,
        conv=ConvParams(
            weight=table.whole(f"{prefix}.conv1d.weight", (sizes.conv_dim, sizes.d_conv)),
            bias=table.whole(f"{prefix}.conv1d.bias", (sizes.conv_dim,))
            if sizes.conv_bias
            else None,
        ),
        ssm=SsmLayerParams(
            A=table.tensor(heads, [Part(f"{prefix}.A_log", transform=_negative_exp)], dtype=_FP32),
            D=table.whole(f"{prefix}.D", heads, dtype=_FP32),
            dt_bias=table.whole(f"{prefix}.dt_bias", heads, dtype=_FP32),
            dt_softplus=True,
            dt_limit=sizes.dt_limit,
        ),
        norm=norm,
    )


def mamba2_mixer(
    table: WeightTable,
    prefix: str,
    index: int,
    d_model: int,
    sizes: MixerSizes,
    norm: GateAndNorm | None,
) -> Mamba2Mixer:
    """Declare a mixer whose weights have the usual names under ``prefix``."""
    return Mamba2Mixer(
        core=mixer_core(table, prefix, index, sizes, norm),
        widths=[sizes.d_inner, sizes.conv_dim, sizes.nheads],
        in_proj=table.projection((sizes.projected, d_model), [Part(f"{prefix}.in_proj.weight")]),
        in_bias=table.whole(f"{prefix}.in_proj.bias", (sizes.projected,))
        if sizes.in_bias
        else None,
        out_proj=table.projection((d_model, sizes.d_inner), [Part(f"{prefix}.out_proj.weight")]),
        out_bias=table.whole(f"{prefix}.out_proj.bias", (d_model,)) if sizes.out_bias else None,
    )


def _negative_exp(A_log: torch.Tensor) -> torch.Tensor:
    return -torch.exp(A_log)
