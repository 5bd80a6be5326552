"""What the library is handed: addresses, sizes and strides in elements. Mirrors src/abi.h."""

from __future__ import annotations

import ctypes
from ctypes import c_double, c_int64, c_void_p

import torch

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1}


def _strided(*names: str) -> list[tuple[str, type]]:
    return [pair for name in names for pair in ((name, c_void_p), (f"{name}_stride", c_int64))]


def _columns(*names: str) -> list[tuple[str, type]]:
    return [(name, c_void_p) for name in names]


class LayerStruct(ctypes.Structure):
    _fields_ = [
        *_strided("ssm_state", "conv_state", "tail_xBC", "tail_x", "tail_B", "tail_dt"),
        *[(name, c_int64) for name in "nheads headdim dstate ngroups conv_dim window grid".split()],
        *[("activation", c_int64), ("state", c_int64)],
    ]


class DraftsStruct(ctypes.Structure):
    _fields_ = _strided("xBC", "x", "B", "dt")


class ParamsStruct(ctypes.Structure):
    _fields_ = [
        *_columns("A", "D", "dt_bias"),
        ("dt_softplus", c_int64),
        ("dt_min", c_double),
        ("dt_max", c_double),
    ]


class ConvStruct(ctypes.Structure):
    _fields_ = _columns("taps", "bias")


class RowsStruct(ctypes.Structure):
    _fields_ = [
        *_strided("x", "dt"),
        ("dt_dtype", c_int64),
        *_strided("B", "C", "z", "out"),
    ]


class ColumnsStruct(ctypes.Structure):
    _fields_ = _strided("xBC", "out")


class ExtendPlanStruct(ctypes.Structure):
    _fields_ = [
        ("num_sequences", c_int64),
        *_columns(
            *"start length offset state_slot tail_page".split(),
            *"first_boundary boundary_position boundary_slot".split(),
        ),
    ]


class DecodePlanStruct(ctypes.Structure):
    _fields_ = [("num_rows", c_int64), *_columns("state_slot", "tail_page", "tail_row")]


class CommitPlanStruct(ctypes.Structure):
    _fields_ = [
        ("num_rows", c_int64),
        *_columns("src_slot", "dst_slot", "tail_page", "tail_rows"),
    ]


class VerifyPlanStruct(ctypes.Structure):
    _fields_ = [
        ("num_sequences", c_int64),
        *_columns("state_slot", "tail_page", "tail_rows", "draft_page", "first_node", "parent"),
    ]


class AcceptPlanStruct(ctypes.Structure):
    _fields_ = [
        ("num_sequences", c_int64),
        *_columns("state_slot", "tail_page", "tail_rows", "draft_page", "boundary_slot"),
        *_columns("first_node", "node"),
    ]


class StepsStruct(ctypes.Structure):
    _fields_ = [
        ("num_sequences", c_int64),
        ("num_steps", c_int64),
        ("num_slots", c_int64),
        ("num_step_rows", c_int64),
        ("state_slot", c_void_p),
        *_strided("ssm_state"),
        *[(n, c_int64) for n in "nheads headdim dstate ngroups activation state".split()],
        ("step_states", c_void_p),
        ("step_stride", c_int64),
        ("step_slot", c_void_p),
        ("parent", c_void_p),
        ("write_state", c_int64),
    ]
