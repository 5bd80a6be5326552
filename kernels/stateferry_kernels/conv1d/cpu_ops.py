"""The causal convolution on the CPU: native/src/conv.h.

Arguments, what is mutated and errors are those of ``conv1d.torch_ops``.
"""

from __future__ import annotations

import torch

from stateferry_kernels.draft_plans import VerifyPlan
from stateferry_kernels.guards import (
    check_conv_inputs,
    check_decode_plan,
    check_drafts,
    check_extend_plan,
    check_verify_plan,
)
from stateferry_kernels.layer_state import ConvParams, DraftRows, LayerState
from stateferry_kernels.native.arguments import (
    Columns,
    conv_struct,
    decode_struct,
    drafts_struct,
    extend_struct,
    layer_struct,
    look_of,
    verify_struct,
)
from stateferry_kernels.native.library import native
from stateferry_kernels.plans import DecodePlan, ExtendPlan


def causal_conv1d_extend(
    xBC: torch.Tensor, *, conv: ConvParams, plan: ExtendPlan, state: LayerState, out: torch.Tensor
) -> None:
    """Convolve a packed batch."""
    check_conv_inputs(xBC, conv, state, out, plan.total_tokens)
    check_extend_plan(plan, state)
    columns = Columns(xBC, out)
    native().conv_extend(
        layer_struct(state),
        conv_struct(conv),
        extend_struct(plan),
        columns.struct,
        torch.get_num_threads(),
    )


def causal_conv1d_row(
    xBC: torch.Tensor, *, conv: ConvParams, plan: DecodePlan, state: LayerState, out: torch.Tensor
) -> None:
    """Convolve one new column per sequence."""
    columns = _row_columns(xBC, conv, state, out, len(plan.state_slots))
    check_decode_plan(plan, state)
    native().conv_row(
        layer_struct(state),
        conv_struct(conv),
        decode_struct(plan),
        columns.struct,
        torch.get_num_threads(),
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
    """Convolve draft columns, each after its own ancestors."""
    check_conv_inputs(xBC, conv, state, out, plan.num_rows)
    check_drafts(drafts, state)
    check_verify_plan(plan, state, drafts)
    columns = Columns(xBC, out)
    native().conv_verify(
        layer_struct(state),
        conv_struct(conv),
        verify_struct(plan),
        columns.struct,
        drafts_struct(drafts),
        torch.get_num_threads(),
    )


def _row_columns(
    xBC: torch.Tensor, conv: ConvParams, state: LayerState, out: torch.Tensor, num_rows: int
) -> Columns:
    """What a row takes and gives, checked unless the layer's last call looked the same."""
    look = [num_rows, *look_of(xBC, out)]
    seen = state.cache.get("conv row")
    if seen is None or seen[0] is not conv or seen[1] != look:
        check_conv_inputs(xBC, conv, state, out, num_rows)
        state.cache["conv row"] = (conv, look)
    return Columns(xBC, out)
