"""``causal_conv1d_update`` with the arguments of causal_conv1d and of SGLang."""

from __future__ import annotations

import torch

from stateferry_kernels.guards import check_tensor
from stateferry_kernels.layer_state import PAD_SLOT
from stateferry_kernels.parity.conv1d import FLOATS, INTEGERS, check_conv, is_silu
from stateferry_kernels.parity.windows import chain_taps, convolve, live_slots, put_live, tree_taps


@torch.no_grad()
def causal_conv1d_update(
    x: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | bool | None = None,
    cache_seqlens: torch.Tensor | None = None,
    conv_state_indices: torch.Tensor | None = None,
    *,
    pad_slot_id: int = PAD_SLOT,
    intermediate_conv_window: torch.Tensor | None = None,
    intermediate_state_indices: torch.Tensor | None = None,
    retrieve_next_token: torch.Tensor | None = None,
    retrieve_next_sibling: torch.Tensor | None = None,
    retrieve_parent_token: torch.Tensor | None = None,
) -> torch.Tensor:
    """One column for each sequence, or T of them, after the window in its slot; causal_conv1d's up
    to ``conv_state_indices``, the others are SGLang's, there by name. fp32 arithmetic. Asks the
    device for nothing. No kernel has this form: it is torch operations on every device.

    Args:
        x: (batch, dim) or (batch, dim, T) fp32, bf16 or fp16.
        conv_state: (slots, dim, state_len), state_len >= width - 1, oldest column first.
        weight: (dim, width). bias: (dim,).
        activation: "silu" or "swish" or True, None or False.
        cache_seqlens: (batch,) int32 or int64. If given, conv_state is a circular buffer, and x
            goes to the columns from cache_seqlens % state_len on.
        conv_state_indices: (batch,) int32 or int64, the slots; by default 0, 1, ..
        pad_slot_id: marks rows of conv_state_indices that are padding.
        intermediate_conv_window: (rows, at least T, dim, width - 1).
        intermediate_state_indices: (batch,) its rows; by default the slots. A negative one keeps
            nothing.
        retrieve_next_token, retrieve_next_sibling: (batch, T), the first child and the next sibling
            of each token of a tree, -1 without; token 0 is the root, and a token that nobody
            names follows it. A token's window is its ancestors', then the slot's.

    Mutates: ``conv_state`` at the slots: the last state_len columns, x as a chain also where it is
        a tree; ``intermediate_conv_window[row, t]``, the window after token t along its path;
        ``retrieve_parent_token`` (batch, T), each token's parent, 0 for the root.
        Nothing of padding rows.
    Returns: the convolution like x, a new tensor, zero in padding rows.
    Raises: TypeError, ValueError naming the argument.
    """
    activate = is_silu(activation)
    if x.dim() not in (2, 3):
        raise ValueError(f"x: {x.dim()} dimensions, expected 2 or 3")
    one_column = x.dim() == 2
    x = x[..., None] if one_column else x
    batch, dim, num_tokens = x.shape
    check_conv(x, weight, bias)
    width = weight.shape[1]
    _check_state(conv_state, dim, width, batch, conv_state_indices, cache_seqlens)
    live = torch.ones(batch, dtype=torch.bool, device=x.device)
    slots = torch.arange(batch, device=x.device)
    if conv_state_indices is not None:
        slots, live = live_slots(conv_state_indices, pad_slot_id)

    old = conv_state[slots]  # (batch, dim, state_len)
    order = _circular_order(cache_seqlens, conv_state)
    if order is not None:
        old = old.gather(2, order.expand_as(old))
    columns = torch.cat([old.to(x.dtype), x], dim=2)
    recent = columns[:, :, columns.shape[2] - num_tokens - (width - 1) :].mT
    taps = chain_taps(num_tokens, width, x.device)
    if retrieve_next_token is not None:
        parents = _parents(retrieve_next_token, retrieve_next_sibling, (batch, num_tokens))
        taps = tree_taps(parents, width)
        if retrieve_parent_token is not None:
            shape = (batch, num_tokens)
            check_tensor("retrieve_parent_token", retrieve_parent_token, shape, INTEGERS)
            kept = torch.where(
                live[:, None], parents.to(retrieve_parent_token.dtype), retrieve_parent_token
            )
            retrieve_parent_token.copy_(kept)
    elif retrieve_next_sibling is not None or retrieve_parent_token is not None:
        raise ValueError("retrieve_next_sibling, retrieve_parent_token need retrieve_next_token")
    y = torch.where(live[:, None, None], convolve(recent, taps, weight, bias, activate), 0).mT

    if intermediate_conv_window is not None:
        rows = slots if intermediate_state_indices is None else intermediate_state_indices
        _keep_windows(recent, taps, rows, live, intermediate_conv_window)
    elif intermediate_state_indices is not None:
        raise ValueError("intermediate_state_indices needs intermediate_conv_window")
    new = columns[:, :, num_tokens:]
    if order is not None:
        place = (order + num_tokens) % conv_state.shape[2]
        new = torch.empty_like(new).scatter_(2, place.expand_as(new), new)
    put_live(conv_state, slots, new.to(conv_state.dtype), live)
    return y[..., 0] if one_column else y


def _keep_windows(
    recent: torch.Tensor,
    taps: torch.Tensor,
    rows: torch.Tensor,
    live: torch.Tensor,
    kept: torch.Tensor,
) -> None:
    """kept[rows[i], t] = the width - 1 columns up to token t, from recent (batch, columns, dim)."""
    batch, _, dim = recent.shape
    num_tokens, width = taps.shape[1:]
    if kept.dim() != 4 or kept.shape[1] < num_tokens:
        raise ValueError(
            f"intermediate_conv_window: shape {tuple(kept.shape)}, expected 4 dimensions and "
            f"{num_tokens} steps"
        )
    shape = (*kept.shape[:2], dim, width - 1)
    check_tensor("intermediate_conv_window", kept, shape, FLOATS)
    check_tensor("intermediate_state_indices", rows, (batch,), INTEGERS)
    index = taps[:, :, 1:].expand(batch, -1, -1).flatten(1)[..., None].expand(-1, -1, dim)
    windows = recent.gather(1, index).view(batch, num_tokens, width - 1, dim).transpose(2, 3)
    rows, has_row = torch.where(rows >= 0, rows, 0).long(), rows >= 0
    put_live(kept[:, :num_tokens], rows, windows.to(kept.dtype), live & has_row)


def _parents(
    next_token: torch.Tensor, next_sibling: torch.Tensor | None, shape: tuple[int, int]
) -> torch.Tensor:
    """Each token's parent (batch, T) int64, 0 for the root and for tokens that nobody names."""
    check_tensor("retrieve_next_token", next_token, shape, INTEGERS)
    if next_sibling is None:
        raise ValueError("retrieve_next_token needs retrieve_next_sibling")
    check_tensor("retrieve_next_sibling", next_sibling, shape, INTEGERS)
    batch, num_tokens = shape
    # A column more, for those who name nobody.
    parents = torch.zeros((batch, num_tokens + 1), dtype=torch.int64, device=next_token.device)
    children, siblings = (
        torch.where((named < 0) | (named >= num_tokens), num_tokens, named).long()
        for named in (next_token, next_sibling)
    )
    for t in range(num_tokens):
        parents.scatter_(1, children[:, t, None], t)
        parents.scatter_(1, siblings[:, t, None], parents[:, t, None].clone())
    return parents[:, :num_tokens]


def _circular_order(
    cache_seqlens: torch.Tensor | None, conv_state: torch.Tensor
) -> torch.Tensor | None:
    """(batch, 1, state_len): the columns of a circular buffer, oldest first."""
    if cache_seqlens is None:
        return None
    state_len = conv_state.shape[2]
    columns = torch.arange(state_len, device=conv_state.device)
    order: torch.Tensor = (cache_seqlens.long()[:, None, None] + columns) % state_len
    return order


def _check_state(
    conv_state: torch.Tensor,
    dim: int,
    width: int,
    batch: int,
    indices: torch.Tensor | None,
    cache_seqlens: torch.Tensor | None,
) -> None:
    if conv_state.dim() != 3 or conv_state.shape[2] < width - 1:
        raise ValueError(
            f"conv_state: shape {tuple(conv_state.shape)}, expected (slots, dim, at least "
            f"{width - 1})"
        )
    shape = (conv_state.shape[0], dim, conv_state.shape[2])
    check_tensor("conv_state", conv_state, shape, FLOATS)
    if indices is not None:
        check_tensor("conv_state_indices", indices, (batch,), INTEGERS)
    elif batch > len(conv_state):
        raise ValueError(f"conv_state: {len(conv_state)} slots, x has {batch} rows")
    if cache_seqlens is not None:
        check_tensor("cache_seqlens", cache_seqlens, (batch,), INTEGERS)
