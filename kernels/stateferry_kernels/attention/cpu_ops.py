"""Attention on the CPU: native/src/attention.h.

Arguments, what is mutated and errors are those of ``attention.torch_ops``; sums in one order, so
that a row's bits depend on its sequence alone.
"""

from __future__ import annotations

import ctypes
from array import array
from itertools import accumulate

import torch

from stateferry_kernels.guards import check_attention_inputs, check_kv_plan
from stateferry_kernels.kv_layer import KvLayer, KvPlan
from stateferry_kernels.native.arguments import look_of, packed_heads
from stateferry_kernels.native.library import native
from stateferry_kernels.native.structs import (
    ATTENTION_ROWS,
    DTYPE_CODES,
    KvLayerStruct,
    KvPlanStruct,
)

_KEY = "native"


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    plan: KvPlan,
    kv: KvLayer,
    scale: float,
    out: torch.Tensor,
) -> None:
    """Append keys and values to their sequences, then let each row attend to [0, its position]."""
    plan_struct = _plan_struct(plan)
    look = [plan_struct.num_rows, *look_of(q, k, v, out)]
    seen = kv.cache.get("rows")
    # A layer's decode steps look the same.
    if seen is not None and seen[0] == look:
        strides = seen[1]
    else:
        check_attention_inputs(q, k, v, out, kv, plan_struct.num_rows)
        packed = [packed_heads(rows) for rows in (q, k, v, out)]
        if packed[3][0] is not out:
            raise ValueError("out: only the first dimension may be strided")
        strides = [stride for _, stride in packed]
        if all(rows is given for (rows, _), given in zip(packed, (q, k, v, out), strict=True)):
            kv.cache["rows"] = (look, strides)
        # Bound to names: copies must live until the call is over.
        (q, _), (k, _), (v, _), _ = packed
    check_kv_plan(plan, kv)
    rows = ATTENTION_ROWS.pack(
        q.data_ptr(),
        strides[0],
        k.data_ptr(),
        strides[1],
        v.data_ptr(),
        strides[2],
        out.data_ptr(),
        strides[3],
        q.shape[1],
        scale,
    )
    native().attention(_layer_struct(kv), plan_struct.struct, rows, torch.get_num_threads())


def _layer_struct(kv: KvLayer) -> KvLayerStruct:
    """The layer's pools. They must have been checked."""
    if _KEY not in kv.cache:
        pools = (kv.keys, kv.values)
        addresses = (n for pool in pools for n in (pool.data_ptr(), pool.stride(0)))
        kv.cache[_KEY] = KvLayerStruct(*addresses, *kv.keys.shape[1:], DTYPE_CODES[kv.keys.dtype])
    struct: KvLayerStruct = kv.cache[_KEY]
    return struct


class _Plan:
    """Where a batch's keys lie: columns of integers, kept alive beside the struct."""

    __slots__ = ("_columns", "num_rows", "struct")

    def __init__(self, plan: KvPlan) -> None:
        sequences = plan.sequences
        lengths = [sequence.length for sequence in sequences]
        offsets = [0, *accumulate(lengths)]
        pages = array("q")
        for sequence in sequences:
            pages.extend(sequence.pages)
        counts = accumulate(len(sequence.pages) for sequence in sequences)
        self._columns = (
            array("q", [sequence.start for sequence in sequences]),
            array("q", lengths),
            array("q", offsets),
            array("q", [0, *counts]),
            pages,
        )
        self.num_rows = offsets[-1]
        starts = [column.buffer_info()[0] for column in self._columns]
        self.struct = KvPlanStruct(len(sequences), *starts)

    def refill(self, other: _Plan) -> None:
        """Say what ``other`` says, at the same address."""
        if other.num_rows != self.num_rows:
            raise ValueError(f"{other.num_rows} rows, {self.num_rows} were recorded")
        self._columns = other._columns
        ctypes.pointer(self.struct)[0] = other.struct


def refill_kv_plan(recorded: KvPlan, plan: KvPlan) -> None:
    """Let the struct that ``recorded`` was handed over as say what ``plan`` says."""
    _plan_struct(recorded).refill(_plan_struct(plan))


def _plan_struct(plan: KvPlan) -> _Plan:
    if _KEY not in plan.cache:
        plan.cache[_KEY] = _Plan(plan)
    cached: _Plan = plan.cache[_KEY]
    return cached
