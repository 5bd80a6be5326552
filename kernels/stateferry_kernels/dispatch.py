"""The operations a model runs on, chosen once at start and handed to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from stateferry_kernels import reference_backend
from stateferry_kernels.conv1d import cpu_ops as conv1d_cpu
from stateferry_kernels.conv1d import torch_ops as conv1d_torch
from stateferry_kernels.draft_plans import AcceptPlan, VerifyPlan
from stateferry_kernels.layer_state import ConvParams, DraftRows, LayerState, SsmLayerParams
from stateferry_kernels.linear import cpu_ops as linear_cpu
from stateferry_kernels.linear import torch_ops as linear_torch
from stateferry_kernels.norm import cpu_ops as norm_cpu
from stateferry_kernels.norm import torch_ops as norm_torch
from stateferry_kernels.plans import CommitPlan, DecodePlan, ExtendPlan
from stateferry_kernels.ssd import cpu_ops as ssd_cpu
from stateferry_kernels.ssd import torch_ops as ssd_torch
from stateferry_kernels.state_update import cpu_ops as update_cpu
from stateferry_kernels.state_update import step_cpu, step_torch
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


class Verify(Protocol):
    def __call__(
        self,
        x: torch.Tensor,
        dt: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        *,
        params: SsmLayerParams,
        plan: VerifyPlan,
        state: LayerState,
        drafts: DraftRows,
        out: torch.Tensor,
        z: torch.Tensor | None = None,
    ) -> None: ...


class Accept(Protocol):
    def __call__(
        self, *, params: SsmLayerParams, plan: AcceptPlan, state: LayerState, drafts: DraftRows
    ) -> None: ...


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


class ConvVerify(Protocol):
    def __call__(
        self,
        xBC: torch.Tensor,
        *,
        conv: ConvParams,
        plan: VerifyPlan,
        state: LayerState,
        drafts: DraftRows,
        out: torch.Tensor,
    ) -> None: ...


class StateStep(Protocol):
    def __call__(
        self,
        ssm_state: torch.Tensor,
        x: torch.Tensor,
        dt: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        *,
        params: SsmLayerParams,
        state_slots: torch.Tensor,
        out: torch.Tensor,
        z: torch.Tensor | None = None,
    ) -> None: ...


class StateSteps(Protocol):
    def __call__(
        self,
        ssm_state: torch.Tensor,
        x: torch.Tensor,
        dt: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        *,
        params: SsmLayerParams,
        state_slots: torch.Tensor,
        out: torch.Tensor,
        z: torch.Tensor | None = None,
        step_states: torch.Tensor | None = None,
        step_slots: torch.Tensor | None = None,
        parents: torch.Tensor | None = None,
        write_state: bool = True,
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
    verify: Verify
    accept: Accept
    causal_conv1d_extend: ConvExtend
    causal_conv1d_row: ConvRow
    causal_conv1d_verify: ConvVerify
    rms_norm: Norm
    gated_rms_norm: GatedNorm
    norm_then_gate: GatedNorm
    linear: Linear
    state_step: StateStep
    state_steps: StateSteps


_TORCH = Kernels(
    name="torch",
    chunk_scan=ssd_torch.chunk_scan,
    decode_row=update_torch.decode_row,
    commit=update_torch.commit,
    verify=update_torch.verify,
    accept=update_torch.accept,
    causal_conv1d_extend=conv1d_torch.causal_conv1d_extend,
    causal_conv1d_row=conv1d_torch.causal_conv1d_row,
    causal_conv1d_verify=conv1d_torch.causal_conv1d_verify,
    rms_norm=norm_torch.rms_norm,
    gated_rms_norm=norm_torch.gated_rms_norm,
    norm_then_gate=norm_torch.norm_then_gate,
    linear=linear_torch.linear,
    state_step=step_torch.state_step,
    state_steps=step_torch.state_steps,
)
_CPU = Kernels(
    name="cpu",
    chunk_scan=ssd_cpu.chunk_scan,
    decode_row=update_cpu.decode_row,
    commit=update_cpu.commit,
    verify=update_cpu.verify,
    accept=update_cpu.accept,
    causal_conv1d_extend=conv1d_cpu.causal_conv1d_extend,
    causal_conv1d_row=conv1d_cpu.causal_conv1d_row,
    causal_conv1d_verify=conv1d_cpu.causal_conv1d_verify,
    rms_norm=norm_cpu.rms_norm,
    gated_rms_norm=norm_cpu.gated_rms_norm,
    norm_then_gate=norm_cpu.norm_then_gate,
    linear=linear_cpu.linear,
    state_step=step_cpu.state_step,
    state_steps=step_cpu.state_steps,
)
_REFERENCE = Kernels(
    name="reference",
    chunk_scan=reference_backend.chunk_scan,
    decode_row=reference_backend.decode_row,
    commit=reference_backend.commit,
    verify=reference_backend.verify,
    accept=reference_backend.accept,
    causal_conv1d_extend=reference_backend.causal_conv1d_extend,
    causal_conv1d_row=reference_backend.causal_conv1d_row,
    causal_conv1d_verify=reference_backend.causal_conv1d_verify,
    rms_norm=reference_backend.rms_norm,
    gated_rms_norm=reference_backend.gated_rms_norm,
    norm_then_gate=reference_backend.norm_then_gate,
    linear=reference_backend.linear,
    state_step=step_torch.state_step,
    state_steps=step_torch.state_steps,
)
_BACKENDS = {kernels.name: kernels for kernels in (_TORCH, _CPU, _REFERENCE)}


def select_kernels(backend: str | None = None) -> Kernels:
    """The named backend, or the best one there is. Raises ValueError listing the names."""
    if backend is None:
        return _TORCH
    if backend not in _BACKENDS:
        raise ValueError(f"no kernel backend {backend!r}; there are: {', '.join(_BACKENDS)}")
    return _BACKENDS[backend]
