"""The operations that a model runs on: what each backend has to offer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from stateferry_kernels.activation import torch_ops as activation_torch
from stateferry_kernels.draft_plans import AcceptPlan, VerifyPlan
from stateferry_kernels.kv_layer import KvLayer, KvPlan
from stateferry_kernels.layer_state import ConvParams, DraftRows, LayerState, SsmLayerParams
from stateferry_kernels.plans import CommitPlan, DecodePlan, ExtendPlan

Result = TypeVar("Result")


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


class StateStepUntied(Protocol):
    def __call__(
        self,
        ssm_state: torch.Tensor,
        x: torch.Tensor,
        dt: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        *,
        A: torch.Tensor,
        D: torch.Tensor | None = None,
        dt_bias: torch.Tensor | None = None,
        dt_softplus: bool = False,
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


class AddNorm(Protocol):
    def __call__(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]: ...


class GatedNorm(Protocol):
    def __call__(
        self, x: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, eps: float, group_size: int
    ) -> torch.Tensor: ...


class Linear(Protocol):
    def __call__(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor: ...


class Attention(Protocol):
    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        plan: KvPlan,
        kv: KvLayer,
        scale: float,
        out: torch.Tensor,
    ) -> None: ...


class Rotary(Protocol):
    def __call__(
        self, x: torch.Tensor, *, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor: ...


class GatedActivation(Protocol):
    def __call__(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor: ...


class Cast(Protocol):
    def __call__(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor: ...


StepPlan = DecodePlan | VerifyPlan


class Tape(Protocol):
    """A step's operations, to be run again on other plans of the kind and of as many rows."""

    @property
    def num_bytes(self) -> int: ...

    def replay(self, plan: StepPlan, kv_plan: KvPlan) -> None: ...


class Recorder(Protocol):
    """Records one step, which must use the recorder's ``plan`` and ``kv_plan``. No tape comes of a
    step that computes anything outside of these operations."""

    plan: StepPlan
    kv_plan: KvPlan

    def record(self, run: Callable[[], Result]) -> tuple[Result, Tape | None]: ...


class MakeRecorder(Protocol):
    def __call__(
        self,
        plan: StepPlan,
        kv_plan: KvPlan,
        states: Sequence[LayerState],
        kv: Sequence[KvLayer],
        drafts: Sequence[DraftRows] = (),
    ) -> Recorder: ...


class Activation(Protocol):
    def __call__(self, x: torch.Tensor) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class Kernels:
    """One backend's operations; see the torch_ops modules for what each takes and mutates.

    Backends of equal ``numerics`` give the same bits; others agree within rounding, so that one
    must not go on with what another has begun.
    """

    name: str
    numerics: str
    chunk_scan: ChunkScan
    decode_row: DecodeRow
    commit: Commit
    verify: Verify
    accept: Accept
    state_step: StateStep
    state_step_untied: StateStepUntied
    state_steps: StateSteps
    causal_conv1d_extend: ConvExtend
    causal_conv1d_row: ConvRow
    causal_conv1d_verify: ConvVerify
    rms_norm: Norm
    gated_rms_norm: GatedNorm
    norm_then_gate: GatedNorm
    add_rms_norm: AddNorm
    linear: Linear
    attention: Attention
    rotary: Rotary
    silu_mul: GatedActivation
    relu2: Activation
    cast: Cast = activation_torch.cast
    recorder: MakeRecorder | None = None  # where a step's overhead is worth it
    # Whether linear takes bf16 weights under fp32 activations.
    widens_weights: bool = False
