"""Which backend's operations a process runs on, chosen once at start and handed to its models.

reference   the definitions, in fp64, one token after the other; no speed at all
torch       torch operations: anywhere, and what the others are checked against
cpu         the C++ library; the choice on a CPU
triton      Triton kernels; the choice on a GPU (on a CPU only under Triton's interpreter)
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

import torch

from stateferry_kernels import reference_backend
from stateferry_kernels.activation import cpu_ops as activation_cpu
from stateferry_kernels.activation import torch_ops as activation_torch
from stateferry_kernels.attention import cpu_ops as attention_cpu
from stateferry_kernels.attention import torch_ops as attention_torch
from stateferry_kernels.conv1d import cpu_ops as conv1d_cpu
from stateferry_kernels.conv1d import torch_ops as conv1d_torch
from stateferry_kernels.linear import cpu_ops as linear_cpu
from stateferry_kernels.linear import fast_ops as linear_fast
from stateferry_kernels.linear import torch_ops as linear_torch
from stateferry_kernels.native.library import NativeUnavailable, native
from stateferry_kernels.native.tape import Recorder
from stateferry_kernels.norm import cpu_ops as norm_cpu
from stateferry_kernels.norm import torch_ops as norm_torch
from stateferry_kernels.operations import Kernels
from stateferry_kernels.rotary import cpu_ops as rotary_cpu
from stateferry_kernels.rotary import torch_ops as rotary_torch
from stateferry_kernels.ssd import cpu_ops as ssd_cpu
from stateferry_kernels.ssd import torch_ops as ssd_torch
from stateferry_kernels.state_update import cpu_ops as update_cpu
from stateferry_kernels.state_update import step_cpu, step_torch
from stateferry_kernels.state_update import torch_ops as update_torch

log = logging.getLogger(__name__)


class BackendUnavailable(RuntimeError):
    """The backend exists, but not here; the message says why."""


def select_kernels(backend: str | None = None, device: torch.device | str = "cpu") -> Kernels:
    """The named backend, or the best one for the device.

    Raises ValueError for a name that there is not, listing those that there are, and
    BackendUnavailable for a named one that cannot run here. Without a name the torch operations
    take the place of what cannot run, and a warning says what that costs.
    """
    if backend is not None:
        if backend not in _BACKENDS:
            raise ValueError(f"no kernel backend {backend!r}; there are: {', '.join(_BACKENDS)}")
        return _BACKENDS[backend]()
    wanted = "triton" if torch.device(device).type == "cuda" else "cpu"
    try:
        return _BACKENDS[wanted]()
    except BackendUnavailable as error:
        log.warning("kernels: serving on torch operations, several times slower, because %s", error)
        return _torch()


def without_row_independence(kernels: Kernels) -> Kernels:
    """The cpu backend's operations with others in the place of some: whatever is fastest, where a
    row's bits may depend on how many rows share the call. Their ``numerics`` has another name.

    Raises ValueError for another backend.
    """
    if kernels.name != "cpu":
        raise ValueError(f"the {kernels.name} backend has no other operations to choose from")
    return replace(kernels, numerics=f"{kernels.numerics}+fast", linear=linear_fast.linear)


def _torch() -> Kernels:
    return Kernels(
        name="torch",
        numerics="torch",
        chunk_scan=ssd_torch.chunk_scan,
        decode_row=update_torch.decode_row,
        commit=update_torch.commit,
        verify=update_torch.verify,
        accept=update_torch.accept,
        state_step=step_torch.state_step,
        state_step_untied=step_torch.state_step_untied,
        state_steps=step_torch.state_steps,
        causal_conv1d_extend=conv1d_torch.causal_conv1d_extend,
        causal_conv1d_row=conv1d_torch.causal_conv1d_row,
        causal_conv1d_verify=conv1d_torch.causal_conv1d_verify,
        rms_norm=norm_torch.rms_norm,
        gated_rms_norm=norm_torch.gated_rms_norm,
        norm_then_gate=norm_torch.norm_then_gate,
        add_rms_norm=norm_torch.add_rms_norm,
        linear=linear_torch.linear,
        attention=attention_torch.attention,
        rotary=rotary_torch.rotary,
        silu_mul=activation_torch.silu_mul,
        relu2=activation_torch.relu2,
    )


def _cpu() -> Kernels:
    try:
        variant = native().variant
    except NativeUnavailable as error:
        raise BackendUnavailable(f"the cpu backend cannot run: {error}") from error
    return Kernels(
        name="cpu",
        numerics=variant.numerics,
        widens_weights=True,
        chunk_scan=ssd_cpu.chunk_scan,
        decode_row=update_cpu.decode_row,
        commit=update_cpu.commit,
        verify=update_cpu.verify,
        accept=update_cpu.accept,
        state_step=step_cpu.state_step,
        state_step_untied=step_torch.state_step_untied,
        state_steps=step_cpu.state_steps,
        causal_conv1d_extend=conv1d_cpu.causal_conv1d_extend,
        causal_conv1d_row=conv1d_cpu.causal_conv1d_row,
        causal_conv1d_verify=conv1d_cpu.causal_conv1d_verify,
        rms_norm=norm_cpu.rms_norm,
        gated_rms_norm=norm_cpu.gated_rms_norm,
        norm_then_gate=norm_cpu.norm_then_gate,
        add_rms_norm=norm_cpu.add_rms_norm,
        linear=linear_cpu.linear,
        attention=attention_cpu.attention,
        rotary=rotary_cpu.rotary,
        silu_mul=activation_cpu.silu_mul,
        relu2=activation_cpu.relu2,
        cast=activation_cpu.cast,
        recorder=Recorder,
    )


def _reference() -> Kernels:
    return Kernels(
        name="reference",
        numerics="reference",
        chunk_scan=reference_backend.chunk_scan,
        decode_row=reference_backend.decode_row,
        commit=reference_backend.commit,
        verify=reference_backend.verify,
        accept=reference_backend.accept,
        state_step=step_torch.state_step,
        state_step_untied=step_torch.state_step_untied,
        state_steps=step_torch.state_steps,
        causal_conv1d_extend=reference_backend.causal_conv1d_extend,
        causal_conv1d_row=reference_backend.causal_conv1d_row,
        causal_conv1d_verify=reference_backend.causal_conv1d_verify,
        rms_norm=reference_backend.rms_norm,
        gated_rms_norm=reference_backend.gated_rms_norm,
        norm_then_gate=reference_backend.norm_then_gate,
        add_rms_norm=reference_backend.add_rms_norm,
        linear=reference_backend.linear,
        attention=reference_backend.attention,
        rotary=reference_backend.rotary,
        silu_mul=reference_backend.silu_mul,
        relu2=reference_backend.relu2,
    )


def _triton() -> Kernels:
    # Its kernels exist only where Triton is installed, and they load it.
    try:
        from stateferry_kernels.triton_backend import triton_kernels
    except ImportError as error:
        raise BackendUnavailable(f"the triton backend cannot run: {error}") from error
    return triton_kernels()


_BACKENDS: dict[str, Callable[[], Kernels]] = {
    "cpu": _cpu,
    "triton": _triton,
    "torch": _torch,
    "reference": _reference,
}
