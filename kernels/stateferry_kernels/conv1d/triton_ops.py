# mypy: allow-untyped-calls
"""Causal convolution in Triton: host entries, same arguments as those of torch_ops.py.

Rows of xBC whose channels are not contiguous are copied first.
"""

from __future__ import annotations

import math

import torch

from stateferry_kernels.conv1d.triton_kernels import (
    extend_kernel,
    leave_tail_kernel,
    row_kernel,
    verify_kernel,
)
from stateferry_kernels.conv1d.triton_tables import (
    NUM_EXTEND_COLUMNS,
    TILE_TOKENS,
    decode_table,
    extend_tables,
    verify_table,
)
from stateferry_kernels.draft_plans import VerifyPlan
from stateferry_kernels.guards import (
    check_conv_inputs,
    check_decode_plan,
    check_drafts,
    check_extend_plan,
    check_verify_plan,
)
from stateferry_kernels.layer_state import ConvParams, DraftRows, LayerState
from stateferry_kernels.plans import DecodePlan, ExtendPlan

# Channels of a program: with a tile of tokens, and with a single one.
_TILE_CHANNELS = 128
# The compiler would fuse a product into a sum in one kernel and not in another: seen on an H100
# with a convolution of one tap, whose rows then differ from those of an extend in the last bit.
_FUSE = False
_ROW_CHANNELS = 256


def causal_conv1d_extend(
    xBC: torch.Tensor,
    *,
    conv: ConvParams,
    plan: ExtendPlan,
    state: LayerState,
    out: torch.Tensor,
) -> None:
    """Convolve a packed batch. xBC and out (total_tokens, conv_dim), raw in, activated out.

    Mutates:  out; tail_xBC rows after each sequence's last grid point; conv_state at each listed
              boundary: the raw columns before it, wherever they came from.
    Raises:   TypeError, ValueError on a mismatch.
    """
    check_conv_inputs(xBC, conv, state, out, plan.total_tokens)
    check_extend_plan(plan, state)
    _check_rows(out)
    if not plan.sequences:
        return
    xBC = _packed(xBC)
    conv_dim, window = state.conv_state.shape[1:]
    tables = extend_tables(plan, window, xBC.device)
    blocks = math.ceil(conv_dim / _TILE_CHANNELS)
    sizes = {
        "CONV_DIM": conv_dim,
        "NUM_COLUMNS": NUM_EXTEND_COLUMNS,
        "BLOCK_T": TILE_TOKENS,
        "BLOCK_C": _TILE_CHANNELS,
    }
    extend_kernel[(len(tables.tiles) * blocks,)](
        xBC,
        out,
        conv.weight,
        conv.bias,
        state.conv_state,
        state.tail_xBC,
        tables.tiles,
        *_strides(xBC, out, conv, state),
        WINDOW=window,
        WRITE_TAIL=tables.later is None,
        enable_fp_fusion=_FUSE,
        **sizes,
    )
    if tables.later is not None:
        leave_tail_kernel[(len(tables.later) * blocks,)](
            xBC,
            state.tail_xBC,
            tables.later,
            xBC.stride(0),
            state.tail_xBC.stride(0),
            **sizes,
        )


def causal_conv1d_row(
    xBC: torch.Tensor,
    *,
    conv: ConvParams,
    plan: DecodePlan,
    state: LayerState,
    out: torch.Tensor,
) -> None:
    """Convolve one new column per sequence. xBC and out (num_seqs, conv_dim).

    Mutates:  out and row ``tail_rows`` of tail_xBC; rows with PAD_SLOT are left alone.
    Raises:   TypeError, ValueError on a mismatch.
    """
    check_conv_inputs(xBC, conv, state, out, len(plan.state_slots))
    check_decode_plan(plan, state)
    _check_rows(out)
    if not plan.state_slots:
        return
    xBC = _packed(xBC)
    conv_dim, window = state.conv_state.shape[1:]
    table = decode_table(plan, xBC.device)
    row_kernel[(len(table) * math.ceil(conv_dim / _ROW_CHANNELS),)](
        xBC,
        out,
        conv.weight,
        conv.bias,
        state.conv_state,
        state.tail_xBC,
        table,
        *_strides(xBC, out, conv, state),
        CONV_DIM=conv_dim,
        WINDOW=window,
        BLOCK_C=_ROW_CHANNELS,
        num_warps=1,
        enable_fp_fusion=_FUSE,
    )


def causal_conv1d_verify(
    xBC: torch.Tensor,
    *,
    conv: ConvParams,
    plan: VerifyPlan,
    state: LayerState,
    drafts: DraftRows,
    out: torch.Tensor,
) -> None:
    """Convolve draft columns, each after its own ancestors. xBC and out (num_rows, conv_dim).

    Mutates:  out; the draft pages' xBC.
    Raises:   TypeError, ValueError on a mismatch.
    """
    check_conv_inputs(xBC, conv, state, out, plan.num_rows)
    check_drafts(drafts, state)
    check_verify_plan(plan, state, drafts)
    _check_rows(out)
    if not plan.sequences:
        return
    xBC = _packed(xBC)
    conv_dim, window = state.conv_state.shape[1:]
    table = verify_table(plan, window, xBC.device)
    verify_kernel[(len(xBC) * math.ceil(conv_dim / _ROW_CHANNELS),)](
        xBC,
        out,
        conv.weight,
        conv.bias,
        state.conv_state,
        state.tail_xBC,
        drafts.xBC,
        table,
        *_strides(xBC, out, conv, state),
        drafts.xBC.stride(0),
        CONV_DIM=conv_dim,
        WINDOW=window,
        NUM_COLUMNS=table.shape[1],
        BLOCK_C=_ROW_CHANNELS,
        num_warps=1,
        enable_fp_fusion=_FUSE,
    )


def _strides(
    xBC: torch.Tensor, out: torch.Tensor, conv: ConvParams, state: LayerState
) -> tuple[int, ...]:
    return (
        xBC.stride(0),
        out.stride(0),
        *conv.weight.stride(),
        state.conv_state.stride(0),
        state.tail_xBC.stride(0),
    )


def _packed(rows: torch.Tensor) -> torch.Tensor:
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _check_rows(out: torch.Tensor) -> None:
    if out.numel() and out.stride(1) != 1:
        raise ValueError("out: the channels of a row must be contiguous")
