"""Device -> backend, chosen once at start and handed to the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from stateferry_kernels.conv1d import torch_ops as conv1d_torch
from stateferry_kernels.linear import torch_ops as linear_torch
from stateferry_kernels.norm import torch_ops as norm_torch
from stateferry_kernels.ssd import torch_ops as ssd_torch
from stateferry_kernels.state_update import torch_ops as update_torch


@dataclass(frozen=True, slots=True)
class Kernels:
    """One backend's operations; see the torch_ops modules for what each takes and mutates."""

    name: str
    chunk_scan: Callable[..., None]
    decode_row: Callable[..., None]
    commit: Callable[..., None]
    causal_conv1d_extend: Callable[..., None]
    causal_conv1d_row: Callable[..., None]
    rms_norm: Callable[..., torch.Tensor]
    gated_rms_norm: Callable[..., torch.Tensor]
    norm_then_gate: Callable[..., torch.Tensor]
    linear: Callable[..., torch.Tensor]


_BACKENDS = {
    "torch": Kernels(
        name="torch",
        chunk_scan=ssd_torch.chunk_scan,
        decode_row=update_torch.decode_row,
        commit=update_torch.commit,
        causal_conv1d_extend=conv1d_torch.causal_conv1d_extend,
        causal_conv1d_row=conv1d_torch.causal_conv1d_row,
        rms_norm=norm_torch.rms_norm,
        gated_rms_norm=norm_torch.gated_rms_norm,
        norm_then_gate=norm_torch.norm_then_gate,
        linear=linear_torch.linear,
    )
}


def select_kernels(backend: str | None = None) -> Kernels:
    """The named backend, or the best one there is. Raises ValueError listing the names."""
    if backend is None:
        backend = "torch"
    if backend not in _BACKENDS:
        raise ValueError(f"no kernel backend {backend!r}; there are: {', '.join(_BACKENDS)}")
    return _BACKENDS[backend]
