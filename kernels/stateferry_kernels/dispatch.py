"""The operations a model runs on, chosen once at start and handed to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from stateferry_kernels import reference_backend
from stateferry_kernels.conv1d import torch_ops as conv1d_torch
from stateferry_kernels.layer_state import ConvParams, LayerState, SsmLayerParams
from stateferry_kernels.linear import torch_ops as linear_torch
from stateferry_kernels.norm import torch_ops as norm_torch
from stateferry_kernels.plans import CommitPlan, DecodePlan, ExtendPlan
from stateferry_kernels.ssd import torch_ops as ssd_torch
from stateferry_kernels.state_update import torch_ops as update_torch


class ChunkScan(Protocol):
    def __call__(
        self,
        x: torch.Tensor,
        dt: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        *,
        params: SsmLayerParams,
        plan: ExtendPlan,
        state: LayerState,
        out: torch.Tensor,
        z: torch.Tensor | None = None,
    ) -> None: ...


class DecodeRow(Protocol):
    def __call__(
        self,
        x: torch.Tensor,
        dt: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        *,
        params: SsmLayerParams,
        plan: DecodePlan,
        state: LayerState,
        out: torch.Tensor,
        z: torch.Tensor | None = None,
    ) -> None: ...


class Commit(Protocol):
    def __call__(self, *, params: SsmLayerParams, plan: CommitPlan, state: LayerState) -> None: ...


class ConvExtend(Protocol):
    def __call__(
        self,
        xBC: torch.Tensor,
        *,
        conv: ConvParams,
        plan: ExtendPlan,
        state: LayerState,
        out: torch.Tensor,
    ) -> None: ...


class ConvRow(Protocol):
    def __call__(
        self,
        xBC: torch.Tensor,
        *,
        conv: ConvParams,
        plan: DecodePlan,
        state: LayerState,
        out: torch.Tensor,
    ) -> None: ...


class Norm(Protocol):
    def __call__(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor: ...


class GatedNorm(Protocol):
    def __call__(
        self, x: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, eps: float, group_size: int
    ) -> torch.Tensor: ...


class Linear(Protocol):
    def __call__(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class Kernels:
    """One backend's operations; see the torch_ops modules for what each takes and mutates."""

    name: str
    chunk_scan: ChunkScan
    decode_row: DecodeRow
    commit: Commit
    causal_conv1d_extend: ConvExtend
    causal_conv1d_row: ConvRow
    rms_norm: Norm
    gated_rms_norm: GatedNorm
    norm_then_gate: GatedNorm
    linear: Linear


_TORCH = Kernels(
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
_REFERENCE = Kernels(
    name="reference",
    chunk_scan=reference_backend.chunk_scan,
    decode_row=reference_backend.decode_row,
    commit=reference_backend.commit,
    causal_conv1d_extend=reference_backend.causal_conv1d_extend,
    causal_conv1d_row=reference_backend.causal_conv1d_row,
    rms_norm=reference_backend.rms_norm,
    gated_rms_norm=reference_backend.gated_rms_norm,
    norm_then_gate=reference_backend.norm_then_gate,
    linear=reference_backend.linear,
)
_BACKENDS = {kernels.name: kernels for kernels in (_TORCH, _REFERENCE)}


def select_kernels(backend: str | None = None) -> Kernels:
    """The named backend, or the best one there is. Raises ValueError listing the names."""
    if backend is None:
        return _TORCH
    if backend not in _BACKENDS:
        raise ValueError(f"no kernel backend {backend!r}; there are: {', '.join(_BACKENDS)}")
    return _BACKENDS[backend]
