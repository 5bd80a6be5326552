"""Causal convolution over raw columns in torch operations: extends, decode rows, draft rows.

out_t = silu(bias + sum over k of weight_k * column_{t - (d_conv - 1) + k})
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from stateferry_kernels.draft_plans import VerifyPlan
from stateferry_kernels.elementwise import silu
from stateferry_kernels.guards import (
    check_conv_inputs,
    check_decode_plan,
    check_drafts,
    check_extend_plan,
    check_verify_plan,
)
from stateferry_kernels.layer_state import ConvParams, DraftRows, LayerState
from stateferry_kernels.live_rows import LiveRows, live_rows
from stateferry_kernels.plans import DecodePlan, ExtendPlan, ExtendSequence


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
    if not plan.sequences:
        return
    window = state.conv_state.shape[2]
    pieces = []
    offsets = plan.cu_seqlens
    for number, sequence in enumerate(plan.sequences):
        rows = xBC[offsets[number] : offsets[number + 1]]
        columns = torch.cat([_window_before(sequence, plan.grid, state), rows])
        pieces.append(columns)
        for write in sequence.boundaries:
            end = window + write.position - sequence.start
            state.conv_state[write.state_slot] = columns[end - window : end].mT
        _leave_tail(sequence, plan.grid, rows, state)
    # One convolution over all sequences; the rows that straddle two of them are dropped.
    joined = torch.cat(pieces)
    convolved = _convolve([joined[k : len(joined) - window + k] for k in range(window + 1)], conv)
    starts = [offsets[n] + n * window for n in range(len(plan.sequences))]
    for number, sequence in enumerate(plan.sequences):
        out[offsets[number] : offsets[number + 1]] = convolved[
            starts[number] : starts[number] + sequence.length
        ]


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
    live = live_rows(plan, xBC.device)
    if not live.count:
        return
    new = live.of(xBC)
    taps = [*_window_of_rows(plan, live, state).unbind(1), new]
    state.tail_xBC[live.pages, live.rows] = new
    live.put(_convolve(taps, conv), out)


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
    window = state.conv_state.shape[2]
    taps, first = [], 0
    for sequence in plan.sequences:
        rows = xBC[first : first + len(sequence.parents)]
        drafts.xBC[sequence.draft_page, : len(rows)] = rows
        first += len(rows)
        tail = state.tail_xBC[sequence.tail_page, : sequence.tail_rows]
        before = torch.cat([state.conv_state[sequence.state_slot].mT, tail])
        for path in sequence.paths():
            columns = torch.cat([before, rows[list(path)]])
            taps.append(columns[len(columns) - window - 1 :])
    if taps:
        out.copy_(_convolve(list(torch.stack(taps, dim=1).unbind()), conv))


@dataclass(frozen=True, slots=True)
class _WindowIndex:
    """Where the d_conv - 1 columns before each live row lie: (num_live, d_conv - 1) each."""

    in_tail: torch.Tensor  # bool, with a last dimension of 1
    tail_rows: torch.Tensor
    columns: torch.Tensor  # of conv_state


def _window_index(plan: DecodePlan, live: LiveRows, window: int) -> _WindowIndex:
    key = f"conv_window:{live.rows.device}:{window}"
    if key not in plan.cache:
        before = torch.arange(-window, 0, device=live.rows.device)
        rows = live.rows[:, None] + before  # negative: before the grid point, in conv_state
        columns = (rows + window).clamp_(max=window - 1)
        plan.cache[key] = _WindowIndex((rows >= 0)[..., None], rows.clamp(min=0), columns)
    index: _WindowIndex = plan.cache[key]
    return index


def _window_of_rows(plan: DecodePlan, live: LiveRows, state: LayerState) -> torch.Tensor:
    """The raw columns before each live row, oldest first, (num_live, d_conv - 1, conv_dim)."""
    conv_dim, window = state.conv_state.shape[1:]
    if not window:
        return state.tail_xBC.new_empty((live.count, 0, conv_dim))
    index = _window_index(plan, live, window)
    old = state.conv_state[live.slots[:, None], :, index.columns]
    tail = state.tail_xBC[live.pages[:, None], index.tail_rows]
    return torch.where(index.in_tail, tail, old)


def _window_before(sequence: ExtendSequence, grid: int, state: LayerState) -> torch.Tensor:
    """The d_conv - 1 raw columns before the extend, (d_conv - 1, conv_dim)."""
    window = state.conv_state.shape[2]
    rows = sequence.start % grid
    tail = state.tail_xBC[sequence.tail_page, max(0, rows - window) : rows]
    old = state.conv_state[sequence.state_slot].mT
    return torch.cat([old[len(tail) :], tail])


def _leave_tail(sequence: ExtendSequence, grid: int, rows: torch.Tensor, state: LayerState) -> None:
    begin = max(sequence.start, sequence.end // grid * grid)
    if begin < sequence.end:
        first, last = begin % grid, (sequence.end - 1) % grid
        state.tail_xBC[sequence.tail_page, first : last + 1] = rows[begin - sequence.start :]


def _convolve(taps: list[torch.Tensor], conv: ConvParams) -> torch.Tensor:
    """taps[k] (num_rows, conv_dim): oldest first. Every product and sum is rounded on its own, in
    one order, so a row's bits do not depend on how many rows there are."""
    weight = conv.weight.float()
    total = taps[0].float() * weight[:, 0]
    for k in range(1, len(taps)):
        total = total + taps[k].float() * weight[:, k]
    if conv.bias is not None:
        total = total + conv.bias.float()
    return silu(total).to(taps[0].dtype)
