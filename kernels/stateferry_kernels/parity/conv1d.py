"""``causal_conv1d_fn`` and ``causal_conv1d_update`` with the arguments of causal_conv1d and of
SGLang."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby, pairwise

import torch

from stateferry_kernels.guards import check_tensor
from stateferry_kernels.layer_state import ACTIVATION_DTYPES, PAD_SLOT, ZERO_SLOT, ConvParams
from stateferry_kernels.operations import Kernels
from stateferry_kernels.parity.host_lists import host_list, packed_offsets
from stateferry_kernels.parity.scan_plan import plan_scan, stretches_of_packed
from stateferry_kernels.parity.throwaway import conv_state as throwaway_conv_state
from stateferry_kernels.parity.throwaway import default_kernels
from stateferry_kernels.parity.windows import (
    convolve,
    last_columns,
    live_slots,
    packed_taps,
    put_live,
)

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int32, torch.int64)
# Rows of a throw-away tail page: any number will do that is no less than the window.
_GRID = 64
_BY_FORM = "by form"


@torch.no_grad()
def causal_conv1d_fn(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    initial_states: torch.Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: torch.Tensor | None = None,
    activation: str | bool | None = _BY_FORM,
    *,
    query_start_loc: torch.Tensor | None = None,
    cache_indices: torch.Tensor | None = None,
    has_initial_state: torch.Tensor | None = None,
    conv_states: torch.Tensor | None = None,
    pad_slot_id: int = PAD_SLOT,
    seq_lens_cpu: Sequence[int] | None = None,
    kernels: Kernels | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The depthwise convolution of whole sequences; causal_conv1d's up to ``activation``, the
    others are SGLang's, there by name. fp32 arithmetic.

    Args:
        x: (batch, dim, seqlen), or (dim, total_tokens) packed; fp32, bf16 or fp16, any strides.
        weight: (dim, width). bias: (dim,).
        seq_idx: (batch, seqlen): a sequence is a run of equal numbers, a negative one is padding.
            Not together with states.
        initial_states: (batch, dim, width - 1), the columns before x; zeros by default.
        final_states_out: (batch, dim, width - 1), where the final states go.
        activation: "silu" or "swish" or True, None or False; by default "silu" where SGLang's
            arguments are used (x packed, or conv_states given) and None elsewhere.
        query_start_loc: (num_seqs + 1,) for packed x: where the sequences begin, and total_tokens.
        seq_lens_cpu: (num_seqs,) their lengths; then query_start_loc is not read.
        conv_states: (slots, dim, width - 1). cache_indices: (num_seqs,) int32 or int64, the slot
            of each sequence, by default 0, 1, ..; pad_slot_id marks sequences that are padding.
        has_initial_state: (num_seqs,) bool, whether a sequence begins with the window in its slot;
            by default none does.

    Mutates: ``final_states_out``; ``conv_states`` at the slots of sequences that are not padding
        and have tokens: the last width - 1 columns, those before x included.
    Returns: the convolution like x, a new tensor, zero in padding; with return_final_states also
        the final states (batch, dim, width - 1) in x's dtype.
    Raises: TypeError, ValueError naming the argument.
    Host: lengths are read on the host (query_start_loc or seq_lens_cpu, seq_idx).
    """
    batched = x.dim() == 3
    if x.dim() not in (2, 3):
        raise ValueError(f"x: {x.dim()} dimensions, expected 2 or 3")
    check_conv(x if batched else x[None], weight, bias)
    if activation == _BY_FORM:
        activation = None if batched and conv_states is None else "silu"
    activate = is_silu(activation)
    _check_together(seq_idx, initial_states, return_final_states, conv_states)
    dim, width = weight.shape
    columns = x.transpose(1, 2).flatten(0, 1) if batched else x.mT
    lengths, padding = _sequences(x, seq_idx, query_start_loc, seq_lens_cpu)
    live = torch.tensor([not padded for padded in padding], dtype=torch.bool, device=x.device)
    slots = torch.arange(len(lengths), device=x.device)
    if cache_indices is not None:
        check_tensor("cache_indices", cache_indices, (len(lengths),), INTEGERS)
        slots, live = live_slots(cache_indices, pad_slot_id)
    windows = columns.new_zeros((len(lengths), dim, width - 1))
    if initial_states is not None:
        check_tensor("initial_states", initial_states, tuple(windows.shape), FLOATS)
        windows = initial_states.to(x.dtype)
    _check_slots(conv_states, cache_indices, has_initial_state, windows)
    if conv_states is not None and has_initial_state is not None:
        kept = (has_initial_state & live)[:, None, None]
        windows = torch.where(kept, conv_states[slots].to(x.dtype), windows)

    source = torch.cat([windows.mT.flatten(0, 1), columns])
    y = _convolve_packed(columns, source, windows, lengths, weight, bias, activate, kernels)
    if cache_indices is not None or any(padding):
        counts = torch.tensor(lengths, device=x.device)
        is_live = torch.repeat_interleave(live, counts, output_size=sum(lengths))
        y = torch.where(is_live[:, None], y, 0)
    final = source[last_columns(lengths, width, x.device)].mT  # (num_seqs, dim, width - 1)
    if conv_states is not None:
        nonempty = torch.tensor([length > 0 for length in lengths], device=x.device)
        put_live(conv_states, slots, final.to(conv_states.dtype), live & nonempty)
    out = y.view(x.shape[0], x.shape[2], dim).transpose(1, 2) if batched else y.mT
    if not return_final_states:
        return out
    if final_states_out is None:
        return out, final
    check_tensor("final_states_out", final_states_out, tuple(final.shape), FLOATS)
    final_states_out.copy_(final)
    return out, final_states_out


def is_silu(activation: str | bool | None) -> bool:
    """Raises ValueError on an activation that there is not."""
    if activation not in (None, True, False, "silu", "swish"):
        raise ValueError(f"activation: {activation!r}, expected None, 'silu' or 'swish'")
    return bool(activation)


def check_conv(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Raises TypeError or ValueError unless they fit: x (batch, dim, seqlen), weight (dim, width),
    bias (dim,)."""
    check_tensor("x", x, tuple(x.shape), FLOATS)
    if weight.dim() != 2 or not weight.shape[1]:
        raise ValueError(f"weight: shape {tuple(weight.shape)}, expected (dim, width)")
    check_tensor("weight", weight, (x.shape[1], weight.shape[1]), FLOATS)
    if bias is not None:
        check_tensor("bias", bias, (x.shape[1],), FLOATS)


def _convolve_packed(
    columns: torch.Tensor,
    source: torch.Tensor,
    windows: torch.Tensor,
    lengths: list[int],
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activate: bool,
    kernels: Kernels | None,
) -> torch.Tensor:
    """(total_tokens, dim) from columns of that shape, through the kernels where they can."""
    width = weight.shape[1]
    tensors = [tensor for tensor in (columns, weight, bias) if tensor is not None]
    dtypes = {tensor.dtype for tensor in tensors}
    if not activate or not dtypes <= set(ACTIVATION_DTYPES) or not 1 < width <= _GRID:
        taps = packed_taps(lengths, width, columns.device)
        return convolve(source[None], taps, weight, bias, activate)[0]
    offsets = [0]
    for length in lengths:
        offsets.append(offsets[-1] + length)
    row = stretches_of_packed(offsets, has_initial=True)
    plan = plan_scan([row], offsets[-1], _GRID, len(lengths), every_edge=False, end_states=False)
    y = torch.empty_like(columns, memory_format=torch.contiguous_format)
    if plan.extend.sequences:
        num_pages = len(plan.extend.sequences)
        state = throwaway_conv_state(columns, plan.num_slots, num_pages, _GRID, width - 1)
        first = ZERO_SLOT + 1
        state.conv_state[first : first + len(lengths)] = windows
        run = (kernels or default_kernels(columns.device.type)).causal_conv1d_extend
        run(columns, conv=ConvParams(weight, bias), plan=plan.extend, state=state, out=y)
    return y


def _sequences(
    x: torch.Tensor,
    seq_idx: torch.Tensor | None,
    query_start_loc: torch.Tensor | None,
    seq_lens_cpu: Sequence[int] | None,
) -> tuple[list[int], list[bool]]:
    """Lengths of the sequences in x, in order, and which of them are padding."""
    if x.dim() == 2:
        if seq_idx is not None:
            raise ValueError("seq_idx: packed x has query_start_loc")
        total = x.shape[1]
        if seq_lens_cpu is not None:
            lengths = [int(length) for length in seq_lens_cpu]
            if sum(lengths) != total or min(lengths, default=0) < 0:
                raise ValueError(f"seq_lens_cpu: {lengths} for {total} tokens")
            return lengths, [False] * len(lengths)
        if query_start_loc is None:
            return [total], [False]
        offsets = packed_offsets("query_start_loc", query_start_loc, total)
        lengths = [end - begin for begin, end in pairwise(offsets)]
        return lengths, [False] * len(lengths)
    for name, value in (("query_start_loc", query_start_loc), ("seq_lens_cpu", seq_lens_cpu)):
        if value is not None:
            raise ValueError(f"{name}: x (batch, dim, seqlen) is not packed")
    batch, _, seqlen = x.shape
    if seq_idx is None:
        return [seqlen] * batch, [False] * batch
    if seq_idx.shape != (batch, seqlen):
        raise ValueError(f"seq_idx: shape {tuple(seq_idx.shape)}, expected {(batch, seqlen)}")
    numbers = host_list("seq_idx", seq_idx)
    runs = []
    for row in range(batch):
        of_row = groupby(numbers[row * seqlen : (row + 1) * seqlen])
        runs += [(number, len(list(run))) for number, run in of_row]
    return [length for _, length in runs], [number < 0 for number, _ in runs]


def _check_together(
    seq_idx: torch.Tensor | None,
    initial_states: torch.Tensor | None,
    return_final_states: bool,
    conv_states: torch.Tensor | None,
) -> None:
    if seq_idx is not None:
        if initial_states is not None or conv_states is not None:
            raise ValueError("seq_idx: not together with initial_states or conv_states")
        if return_final_states:
            raise ValueError("return_final_states: not together with seq_idx")
    if initial_states is not None and conv_states is not None:
        raise ValueError("initial_states: not together with conv_states")


def _check_slots(
    conv_states: torch.Tensor | None,
    cache_indices: torch.Tensor | None,
    has_initial_state: torch.Tensor | None,
    windows: torch.Tensor,
) -> None:
    """windows: (num_seqs, dim, width - 1)."""
    num_seqs = len(windows)
    if conv_states is None:
        if cache_indices is not None or has_initial_state is not None:
            raise ValueError("cache_indices, has_initial_state need conv_states")
        return
    check_tensor("conv_states", conv_states, (len(conv_states), *windows.shape[1:]), FLOATS)
    if cache_indices is None and num_seqs > len(conv_states):
        raise ValueError(f"conv_states: {len(conv_states)} slots, {num_seqs} sequences")
    if has_initial_state is not None:
        check_tensor("has_initial_state", has_initial_state, (num_seqs,), (torch.bool,))
