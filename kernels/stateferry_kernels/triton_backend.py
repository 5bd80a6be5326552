"""The Triton backend's operations, put together."""

from __future__ import annotations

import torch

from stateferry_kernels.activation import triton_ops as activation_triton
from stateferry_kernels.attention import triton_ops as attention_triton
from stateferry_kernels.conv1d import triton_ops as conv1d_triton
from stateferry_kernels.linear import triton_ops as linear_triton
from stateferry_kernels.norm import triton_ops as norm_triton
from stateferry_kernels.operations import Kernels
from stateferry_kernels.rotary import triton_ops as rotary_triton
from stateferry_kernels.ssd import triton_ops as ssd_triton
from stateferry_kernels.state_update import step_triton
from stateferry_kernels.state_update import triton_ops as update_triton


def triton_kernels() -> Kernels:
    """All operations. Its bits depend on the GPU: ``numerics`` names its architecture."""
    return Kernels(
        name="triton",
        numerics=f"triton-{_architecture()}",
        chunk_scan=ssd_triton.chunk_scan,
        decode_row=update_triton.decode_row,
        commit=update_triton.commit,
        verify=update_triton.verify,
        accept=update_triton.accept,
        state_step=step_triton.state_step,
        state_step_untied=step_triton.state_step_untied,
        state_steps=step_triton.state_steps,
        causal_conv1d_extend=conv1d_triton.causal_conv1d_extend,
        causal_conv1d_row=conv1d_triton.causal_conv1d_row,
        causal_conv1d_verify=conv1d_triton.causal_conv1d_verify,
        rms_norm=norm_triton.rms_norm,
        gated_rms_norm=norm_triton.gated_rms_norm,
        norm_then_gate=norm_triton.norm_then_gate,
        add_rms_norm=norm_triton.add_rms_norm,
        linear=linear_triton.linear,
        attention=attention_triton.attention,
        rotary=rotary_triton.rotary,
        silu_mul=activation_triton.silu_mul,
        relu2=activation_triton.relu2,
    )


def _architecture() -> str:
    if not torch.cuda.is_available():
        return "interpreted"
    major, minor = torch.cuda.get_device_capability()
    return f"sm{major}{minor}"
