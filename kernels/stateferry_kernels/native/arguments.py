"""Tensors, layers and plans as the library takes them.

What belongs to a layer or a plan is built once and kept in its ``cache``.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable, Iterable
from operator import attrgetter
from typing import Any, TypeVar

import torch

from stateferry_kernels.draft_plans import AcceptPlan, VerifyPlan
from stateferry_kernels.layer_state import ConvParams, DraftRows, LayerState, SsmLayerParams
from stateferry_kernels.native.structs import (
    COLUMNS,
    DTYPE_CODES,
    ROWS,
    AcceptPlanStruct,
    CommitPlanStruct,
    ConvStruct,
    DecodePlanStruct,
    DraftsStruct,
    ExtendPlanStruct,
    LayerStruct,
    ParamsStruct,
    VerifyPlanStruct,
)
from stateferry_kernels.plans import CommitPlan, DecodePlan, ExtendPlan

_KEY = "native"
_KIND = attrgetter("dtype", "shape")
_Struct = TypeVar("_Struct", bound=ctypes.Structure)


def layer_struct(state: LayerState) -> LayerStruct:
    """The layer's pools. They must have been checked (guards.check_state)."""
    if _KEY not in state.cache:
        _, nheads, headdim, dstate = state.ssm_state.shape
        conv_dim, window = state.conv_state.shape[1:]
        pools = (state.ssm_state, state.conv_state)
        tails = (state.tail_xBC, state.tail_x, state.tail_B, state.tail_dt)
        state.cache[_KEY] = LayerStruct(
            *_addresses(*pools, *tails),
            *(nheads, headdim, dstate, state.tail_B.shape[2], conv_dim, window, state.grid),
            DTYPE_CODES[state.tail_x.dtype],
            DTYPE_CODES[state.ssm_state.dtype],
        )
    struct: LayerStruct = state.cache[_KEY]
    return struct


def drafts_struct(drafts: DraftRows) -> DraftsStruct:
    """The layer's draft pages."""
    if _KEY not in drafts.cache:
        drafts.cache[_KEY] = DraftsStruct(*_addresses(drafts.xBC, drafts.x, drafts.B, drafts.dt))
    struct: DraftsStruct = drafts.cache[_KEY]
    return struct


def params_struct(params: SsmLayerParams) -> ParamsStruct:
    """The recurrence's parameters, whose vectors must be contiguous."""
    if _KEY not in params.cache:
        vectors = [
            None if vector is None else vector.contiguous()
            for vector in (params.A, params.D, params.dt_bias)
        ]
        addresses = [0 if vector is None else vector.data_ptr() for vector in vectors]
        struct = ParamsStruct(*addresses, int(params.dt_softplus), *params.dt_limit)
        params.cache[_KEY] = (struct, vectors)
    cached: tuple[ParamsStruct, Any] = params.cache[_KEY]
    return cached[0]


def conv_struct(conv: ConvParams) -> ConvStruct:
    """The convolution's weights, tap by tap in fp32."""
    if _KEY not in conv.cache:
        taps = conv.weight.float().T.contiguous()
        bias = None if conv.bias is None else conv.bias.float().contiguous()
        struct = ConvStruct(taps.data_ptr(), 0 if bias is None else bias.data_ptr())
        conv.cache[_KEY] = (struct, taps, bias)
    cached: tuple[ConvStruct, Any, Any] = conv.cache[_KEY]
    return cached[0]


def look_of(*tensors: torch.Tensor) -> list[object]:
    """All that the checks of host entries, and the strides they hand over, depend on: a call that
    looks like the last one needs no check."""
    return [*map(_KIND, tensors), *map(torch.Tensor.stride, tensors)]


class Rows:
    """A batch's inputs and output, packed; keeps alive what had to be copied.

    Built for every call that looks new: it takes some microseconds.
    """

    __slots__ = ("_alive", "copied", "dtype_code", "strides", "struct")

    def __init__(
        self,
        x: torch.Tensor,
        dt: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        z: torch.Tensor | None,
        out: torch.Tensor,
    ) -> None:
        given = (x, dt, B, C, z)
        x, x_stride = packed_heads(x)
        B, B_stride = packed_heads(B)
        C, C_stride = packed_heads(C)
        dt_stride, dt_inner = dt.stride()
        if dt_inner != 1 and dt.shape[1] != 1:
            dt = dt.contiguous()
            dt_stride = dt.stride(0)
        z_stride = 0
        if z is not None:
            z, z_stride = packed_heads(z)
        packed_out, out_stride = packed_heads(out)
        if packed_out is not out:
            raise ValueError("out: only the first dimension may be strided")
        self._alive = (x, dt, B, C, z)
        self.copied = any(a is not b for a, b in zip(given, self._alive, strict=True))
        self.dtype_code = DTYPE_CODES[x.dtype]
        dt_code = DTYPE_CODES[dt.dtype]
        self.strides = (x_stride, dt_stride, dt_code, B_stride, C_stride, z_stride, out_stride)
        self.struct = pack_rows(self.strides, x, dt, B, C, z, out)


def pack_rows(
    strides: tuple[int, ...],
    x: torch.Tensor,
    dt: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    z: torch.Tensor | None,
    out: torch.Tensor,
) -> bytes:
    """Rows that look like others which were not ``copied``, by the ``strides`` of those."""
    x_stride, dt_stride, dt_code, B_stride, C_stride, z_stride, out_stride = strides
    return ROWS.pack(
        x.data_ptr(),
        x_stride,
        dt.data_ptr(),
        dt_stride,
        dt_code,
        B.data_ptr(),
        B_stride,
        C.data_ptr(),
        C_stride,
        0 if z is None else z.data_ptr(),
        z_stride,
        out.data_ptr(),
        out_stride,
    )


class Columns:
    """Raw columns and the activated ones."""

    def __init__(self, xBC: torch.Tensor, out: torch.Tensor) -> None:
        stride, inner = xBC.stride()
        if inner != 1 and xBC.shape[1] != 1:
            xBC = xBC.contiguous()
            stride = xBC.stride(0)
        out_stride, out_inner = out.stride()
        if out_inner != 1 and out.shape[1] != 1:
            raise ValueError("out: only the first dimension may be strided")
        self._alive = xBC
        self.struct = COLUMNS.pack(xBC.data_ptr(), stride, out.data_ptr(), out_stride)


def packed_heads(rows: torch.Tensor) -> tuple[torch.Tensor, int]:
    """rows (n, heads, dim), copied unless only the first dimension is strided; and that stride."""
    first, heads, inner = rows.stride()
    _, num_heads, dim = rows.shape
    if (dim == 1 or inner == 1) and (num_heads == 1 or heads == dim):
        return rows, first
    rows = rows.contiguous()
    return rows, rows.stride(0)


def _addresses(*tensors: torch.Tensor) -> tuple[int, ...]:
    """Address and first stride of each."""
    return tuple(n for tensor in tensors for n in (tensor.data_ptr(), tensor.stride(0)))


def extend_struct(plan: ExtendPlan) -> ExtendPlanStruct:
    """Where an extend's rows come from and go to."""

    def build() -> tuple[ExtendPlanStruct, Any]:
        sequences = plan.sequences
        writes = [write for sequence in sequences for write in sequence.boundaries]
        columns = _int64s(
            [s.start for s in sequences],
            [s.length for s in sequences],
            plan.cu_seqlens,
            [s.state_slot for s in sequences],
            [s.tail_page for s in sequences],
            _offsets(len(s.boundaries) for s in sequences),
            [write.position for write in writes],
            [write.state_slot for write in writes],
        )
        return ExtendPlanStruct(len(sequences), *_starts(columns)), columns

    return _cached(plan.cache, build)


def decode_struct(plan: DecodePlan) -> DecodePlanStruct:
    """Where a decode step's rows come from and go to."""

    def build() -> tuple[DecodePlanStruct, Any]:
        columns = _int64s(plan.state_slots, plan.tail_pages, plan.tail_rows)
        return DecodePlanStruct(len(plan.state_slots), *_starts(columns)), columns

    return _cached(plan.cache, build)


def refill_decode(recorded: DecodePlan, plan: DecodePlan) -> None:
    """Let the struct that ``recorded`` was handed over as say what ``plan`` says."""
    decode_struct(recorded)
    columns = recorded.cache[_KEY][1]
    for column, numbers in zip(
        columns, (plan.state_slots, plan.tail_pages, plan.tail_rows), strict=True
    ):
        if len(numbers) != len(column):
            raise ValueError(f"{len(numbers)} rows, {len(column)} were recorded")
        column[:] = array("q", numbers)


def refill_verify(recorded: VerifyPlan, plan: VerifyPlan) -> None:
    """Likewise, of a verification of as many rows, in whatever drafts."""
    if recorded.num_rows != plan.num_rows:
        raise ValueError(f"{plan.num_rows} rows, {recorded.num_rows} were recorded")
    struct = verify_struct(recorded)
    ctypes.pointer(struct)[0] = verify_struct(plan)
    # What it points to now has to live as long as it may be looked at.
    recorded.cache[_KEY] = (struct, plan.cache[_KEY][1])


def commit_struct(plan: CommitPlan) -> CommitPlanStruct:
    """Which tails are folded into which slots."""

    def build() -> tuple[CommitPlanStruct, Any]:
        columns = _int64s(plan.src_slots, plan.dst_slots, plan.tail_pages, plan.tail_rows)
        return CommitPlanStruct(len(plan.src_slots), *_starts(columns)), columns

    return _cached(plan.cache, build)


def verify_struct(plan: VerifyPlan) -> VerifyPlanStruct:
    """What each draft row follows."""

    def build() -> tuple[VerifyPlanStruct, Any]:
        sequences = plan.sequences
        columns = _int64s(
            [s.state_slot for s in sequences],
            [s.tail_page for s in sequences],
            [s.tail_rows for s in sequences],
            [s.draft_page for s in sequences],
            _offsets(len(s.parents) for s in sequences),
            [parent for s in sequences for parent in s.parents],
        )
        return VerifyPlanStruct(len(sequences), *_starts(columns)), columns

    return _cached(plan.cache, build)


def accept_struct(plan: AcceptPlan) -> AcceptPlanStruct:
    """Which draft rows are kept."""

    def build() -> tuple[AcceptPlanStruct, Any]:
        sequences = plan.sequences
        columns = _int64s(
            [s.state_slot for s in sequences],
            [s.tail_page for s in sequences],
            [s.tail_rows for s in sequences],
            [s.draft_page for s in sequences],
            [s.boundary_slot for s in sequences],
            _offsets(len(s.path) for s in sequences),
            [node for s in sequences for node in s.path],
        )
        return AcceptPlanStruct(len(sequences), *_starts(columns)), columns

    return _cached(plan.cache, build)


def _cached(cache: dict[str, Any], build: Callable[[], tuple[_Struct, Any]]) -> _Struct:
    """The struct that ``build`` made once; what it points to is kept alive beside it."""
    if _KEY not in cache:
        cache[_KEY] = build()
    struct: _Struct = cache[_KEY][0]
    return struct


def _int64s(*columns: Iterable[int]) -> list[array[int]]:
    return [array("q", column) for column in columns]


def _starts(columns: list[array[int]]) -> list[int]:
    return [column.buffer_info()[0] for column in columns]


def _offsets(counts: Iterable[int]) -> list[int]:
    offsets = [0]
    for count in counts:
        offsets.append(offsets[-1] + count)
    return offsets
