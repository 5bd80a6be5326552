"""Causal convolution over raw columns in torch operations, for extends and for decode rows.

out_t = silu(bias + sum over k of weight_k * column_{t - (d_conv - 1) + k})
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from stateferry_kernels.elementwise import silu
from stateferry_kernels.guards import check_tensor
from stateferry_kernels.layer_state import PAD_SLOT, ConvParams, LayerState
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
    _check(xBC, conv, state, out, plan.total_tokens)
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
    _check(xBC, conv, state, out, len(plan.state_slots))
    index = _row_index(plan, state)
    if not index.live.numel():
        return
    new = xBC[index.live]
    taps = []
    for from_tail, rows, columns in index.taps:
        old = state.conv_state[index.slots, :, columns]
        tail = state.tail_xBC[index.pages, rows]
        taps.append(torch.where(from_tail[:, None], tail, old))
    state.tail_xBC[index.pages, index.rows] = new
    out[index.live] = _convolve([*taps, new], conv)


@dataclass(frozen=True, slots=True)
class _RowIndex:
    """Where each tap of each live row lies. A tap is (is it in the tail, tail row, conv column)."""

    live: torch.Tensor
    slots: torch.Tensor
    pages: torch.Tensor
    rows: torch.Tensor
    taps: tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], ...]


def _row_index(plan: DecodePlan, state: LayerState) -> _RowIndex:
    device, window = state.conv_state.device, state.conv_state.shape[2]
    key = f"conv_row:{device}:{window}"
    if key not in plan.cache:
        live = [i for i, slot in enumerate(plan.state_slots) if slot != PAD_SLOT]
        rows = torch.tensor([plan.tail_rows[i] for i in live], dtype=torch.int64, device=device)
        taps = []
        for k in range(window):
            row = rows - window + k  # negative: before the grid point, in conv_state
            taps.append((row >= 0, row.clamp(min=0), (row + window).clamp(max=window - 1)))
        plan.cache[key] = _RowIndex(
            live=torch.tensor(live, dtype=torch.int64, device=device),
            slots=torch.tensor([plan.state_slots[i] for i in live], device=device),
            pages=torch.tensor([plan.tail_pages[i] for i in live], device=device),
            rows=rows,
            taps=tuple(taps),
        )
    index: _RowIndex = plan.cache[key]
    return index


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


def _check(
    xBC: torch.Tensor, conv: ConvParams, state: LayerState, out: torch.Tensor, num_rows: int
) -> None:
    conv_dim, window = state.conv_state.shape[1:]
    dtypes = (state.conv_state.dtype,)
    check_tensor("xBC", xBC, (num_rows, conv_dim), dtypes)
    check_tensor("out", out, (num_rows, conv_dim), dtypes)
    weight_dtypes = (torch.float32, torch.bfloat16)
    check_tensor("weight", conv.weight, (conv_dim, window + 1), weight_dtypes)
    if conv.bias is not None:
        check_tensor("bias", conv.bias, (conv_dim,), weight_dtypes)
