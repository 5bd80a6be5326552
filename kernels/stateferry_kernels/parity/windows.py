"""A causal convolution of rows whose predecessors lie anywhere, and windows kept in slots.

The kernels in grid form keep columns in pages and never change a window; here the caller's windows
are updated in place, after every call.
"""

from __future__ import annotations

import torch

from stateferry_kernels.elementwise import silu


def convolve(
    source: torch.Tensor,
    taps: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activate: bool,
) -> torch.Tensor:
    """source (n, columns, dim), taps (n or 1, rows, width) int64: the columns that make up a row,
    oldest first; weight (dim, width). Returns (n, rows, dim) in source's dtype, from fp32."""
    n, rows = len(source), taps.shape[1]
    shape = (n, rows, source.shape[2])
    total = torch.zeros(shape, dtype=torch.float32, device=source.device)
    if bias is not None:
        total = total + bias.float()
    for k in range(taps.shape[2]):
        column = source.gather(1, taps[:, :, k, None].expand(shape))
        total = total + column.float() * weight[:, k].float()
    return (silu(total) if activate else total).to(source.dtype)


def chain_taps(num_tokens: int, width: int, device: torch.device) -> torch.Tensor:
    """Taps (1, num_tokens, width) of tokens that follow a window of width - 1 columns."""
    first = torch.arange(num_tokens, device=device)
    return (first[:, None] + torch.arange(width, device=device))[None]


def tree_taps(parents: torch.Tensor, width: int) -> torch.Tensor:
    """Taps (n, num_tokens, width) where token t > 0 follows token parents[i, t] (n, num_tokens)
    int64, and token 0 a window of width - 1 columns."""
    n, num_tokens = parents.shape
    window = width - 1
    columns = torch.arange(window + num_tokens, device=parents.device).expand(n, -1)
    # The column before each column; before the window's first one nobody looks.
    before = torch.cat([columns[:, : window + 1] - 1, parents[:, 1:] + window], dim=1)
    taps = [columns[:, window:]]
    for _ in range(window):
        taps.append(before.gather(1, taps[-1]))
    return torch.stack(taps[::-1], dim=2)


def packed_taps(lengths: list[int], width: int, device: torch.device) -> torch.Tensor:
    """Taps (1, sum of lengths, width) into the windows of all sequences, width - 1 columns each,
    followed by all their tokens."""
    window = width - 1
    counts = torch.tensor(lengths, dtype=torch.int64)
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), counts)
    position = torch.arange(len(sequence)) - (counts.cumsum(0) - counts)[sequence]
    back = torch.arange(-window, 1)
    in_tokens = torch.arange(len(sequence))[:, None] + back + len(lengths) * window
    in_window = sequence[:, None] * window + position[:, None] + window + back
    return torch.where(position[:, None] + back >= 0, in_tokens, in_window)[None].to(device)


def last_columns(lengths: list[int], width: int, device: torch.device) -> torch.Tensor:
    """Where the width - 1 columns before each sequence's end lie, (num_seqs, width - 1) int64, in
    the order of columns of ``packed_taps``."""
    window = width - 1
    counts = torch.tensor(lengths, dtype=torch.int64)
    position = counts[:, None] + torch.arange(-window, 0)
    in_tokens = len(lengths) * window + (counts.cumsum(0) - counts)[:, None] + position
    in_window = torch.arange(len(lengths))[:, None] * window + position + window
    return torch.where(position >= 0, in_tokens, in_window).to(device)


def live_slots(indices: torch.Tensor, pad_slot_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Slots (n,) int64, 0 in padding rows, and which rows are not padding."""
    live = indices != pad_slot_id
    return torch.where(live, indices, 0).long(), live


def put_live(
    pool: torch.Tensor, slots: torch.Tensor, values: torch.Tensor, live: torch.Tensor
) -> None:
    """pool[slots[i]] = values[i] where live[i], without asking the device which rows those are: the
    others repeat the first live row's write, or, if there is none, rewrite a slot as it is."""
    if not len(slots):
        return
    first = live.int().argmax()[None]
    slots = torch.where(live, slots, slots.index_select(0, first))
    is_live = live.view(-1, *[1] * (values.dim() - 1))
    values = torch.where(is_live, values, values.index_select(0, first))
    pool[slots] = torch.where(live.any(), values, pool[slots])
