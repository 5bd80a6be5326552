"""What the library is handed: addresses, sizes and strides in elements. Mirrors src/abi.h and
src/packed_abi.h.

What is kept between calls is a ctypes structure; what every call makes anew is packed into bytes,
which takes a third of the time.
"""

from __future__ import annotations

import ctypes
from ctypes import c_double, c_int64, c_void_p
from struct import Struct

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


class KvLayerStruct(ctypes.Structure):
    _fields_ = [
        *_strided("keys", "values"),
        *[(name, c_int64) for name in "kv_heads page_tokens head_dim dtype".split()],
    ]


class KvPlanStruct(ctypes.Structure):
    _fields_ = [
        ("num_sequences", c_int64),
        *_columns("start", "length", "offset", "first_page", "page"),
    ]


# q for integers and addresses, d for doubles; sf_ and the name in src.
ROWS = Struct("13q")
COLUMNS = Struct("4q")
STEPS = Struct("18q")
LINEAR_ARGS = Struct("10q")
NORM_ARGS = Struct("7qd5q")
ADD_NORM_ARGS = Struct("8qd4q")
ACTIVATION_ARGS = Struct("9q")
ROTARY_ARGS = Struct("12q")
CAST_ARGS = Struct("7q")
ATTENTION_ROWS = Struct("9qd")
