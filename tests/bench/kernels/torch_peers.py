"""The plain step and the scan as one writes them in torch operations, to be fast there."""

from __future__ import annotations

import torch

from stateferry_kernels.layer_state import SsmLayerParams
from stateferry_kernels.ssd.grid_form import process_dt


def state_step(
    state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    *,
    params: SsmLayerParams,
    out: torch.Tensor,
) -> None:
    """state (num_seqs, nheads, headdim, dstate) fp32 in place, without slots: three passes over
    it."""
    num_seqs, nheads, headdim, dstate = state.shape
    ngroups = B.shape[1]
    per_group = nheads // ngroups
    processed = process_dt(dt, params)
    state.mul_(torch.exp(processed * params.A)[..., None, None])
    grouped = state.view(num_seqs, ngroups, per_group, headdim, dstate)
    scaled = (processed[..., None] * x.float()).view(num_seqs, ngroups, per_group, headdim, 1)
    grouped.addcmul_(scaled, B.float()[:, :, None, None])
    rows = state.view(num_seqs * ngroups, per_group * headdim, dstate)
    y = torch.bmm(rows, C.float().view(num_seqs * ngroups, dstate, 1)).view(x.shape)
    if params.D is not None:
        y = torch.addcmul(y, x.float(), params.D[:, None])
    out.copy_(y)


def chunk_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    *,
    params: SsmLayerParams,
    chunk_size: int,
    out: torch.Tensor,
) -> torch.Tensor:
    """One sequence from a state of zeros, in block matmuls: blocks below the diagonal, states added
    by each chunk, states passed along, and what each state adds to the rows after it.

    All heads of a group share a matmul wherever B or C is the other factor. Returns the state
    after the last token (nheads, headdim, dstate) fp32.
    """
    length, nheads, headdim = x.shape
    ngroups, dstate = B.shape[1:]
    chunks, per_group = -(-length // chunk_size), nheads // ngroups
    size = (chunks, chunk_size)
    x, B, C = (_padded(rows.float(), chunks * chunk_size) for rows in (x, B, C))
    processed = _padded(process_dt(dt, params), chunks * chunk_size)

    cumsum = (processed * params.A).view(*size, nheads).cumsum(1)
    by_head = cumsum.transpose(1, 2).contiguous()
    B = B.view(*size, ngroups, dstate).transpose(1, 2).reshape(-1, chunk_size, dstate)
    C = C.view(*size, ngroups, dstate).transpose(1, 2).reshape(-1, chunk_size, dstate)
    x_dt = (x * processed[..., None]).view(*size, nheads, headdim)

    # Rows of one chunk among themselves.
    later = torch.ones(chunk_size, chunk_size, dtype=torch.bool).triu_(1)
    weights = by_head[..., None] - by_head[:, :, None]
    weights.masked_fill_(later, -torch.inf).exp_()
    CB = torch.bmm(C, B.transpose(1, 2)).view(chunks, ngroups, 1, chunk_size, chunk_size)
    weights.view(chunks, ngroups, per_group, chunk_size, chunk_size).mul_(CB)
    values = x_dt.transpose(1, 2).reshape(-1, chunk_size, headdim)
    y = torch.bmm(weights.view(-1, chunk_size, chunk_size), values)
    y = y.view(chunks, nheads, chunk_size, headdim).transpose(1, 2).contiguous()

    # What each chunk adds to the state, and the states that the chunks begin with.
    to_end = torch.exp(cumsum[:, -1:] - cumsum)[..., None]
    inputs = (x_dt * to_end).view(*size, ngroups, per_group * headdim).transpose(1, 2)
    inputs = inputs.reshape(-1, chunk_size, per_group * headdim)
    added = torch.bmm(inputs.transpose(1, 2), B).view(chunks, nheads, headdim, dstate)
    decay = torch.exp(cumsum[:, -1])[..., None, None]
    state = torch.zeros_like(added[0])
    incoming = torch.empty_like(added)
    for chunk in range(chunks):
        incoming[chunk] = state
        state.mul_(decay[chunk]).add_(added[chunk])

    # What those states add to their chunks' rows.
    before = incoming.view(-1, per_group * headdim, dstate).transpose(1, 2)
    carried = torch.bmm(C, before).view(chunks, ngroups, chunk_size, per_group, headdim)
    carried = carried.transpose(1, 2).reshape(*size, nheads, headdim)
    y.addcmul_(carried, torch.exp(cumsum)[..., None])
    if params.D is not None:
        y.addcmul_(x.view(y.shape), params.D[:, None])
    out.copy_(y.view(-1, nheads, headdim)[:length])
    return state


def _padded(rows: torch.Tensor, length: int) -> torch.Tensor:
    """Zeros after the last row: with dt = 0 they neither decay the state nor add to it."""
    if rows.shape[0] == length:
        return rows
    padded = rows.new_zeros((length, *rows.shape[1:]))
    padded[: rows.shape[0]] = rows
    return padded
