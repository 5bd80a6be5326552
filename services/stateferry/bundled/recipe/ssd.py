"""The state space dual (SSD) form of Mamba-2, differentiable, in plain torch.

One head keeps a state S of shape (headdim, dstate) and follows, with a_t = exp(dt_t * A),

    S_t = a_t S_{t-1} + dt_t x_t B_t^T,        y_t = S_t C_t.

Written as one matrix, y = M (dt x) with M[t, s] = (C_t . B_s) a_{s+1} ... a_t for s <= t: a
semiseparable matrix. `ssd_blocks` multiplies by it in blocks: the diagonal blocks as small
attention-like products, the rest through one state per chunk. `ssd_recurrent` is the definition.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def segment_sums(log_decay: Tensor) -> Tensor:
    """Sums over (s, t] of the last dimension, -inf above the diagonal.

    log_decay: (..., length) float32 or float64. Returns (..., length, length), entry [t, s] =
    log_decay[s + 1] + ... + log_decay[t]. Differences of one running sum are exact enough here
    because a chunk is short; across chunks the decays are multiplied as states, not subtracted.
    """
    length = log_decay.shape[-1]
    running = log_decay.cumsum(-1)
    sums = running[..., :, None] - running[..., None, :]
    causal = torch.ones(length, length, dtype=torch.bool, device=log_decay.device).tril()
    return sums.masked_fill(~causal, float("-inf"))


def ssd_blocks(x: Tensor, log_decay: Tensor, b: Tensor, c: Tensor, chunk_size: int) -> Tensor:
    """Block form of y = M x for a zero initial state.

    x: (batch, length, nheads, headdim), already multiplied by dt, compute dtype.
    log_decay: (batch, length, nheads) = dt * A, float32 (or float64): decays keep full precision.
    b, c: (batch, length, ngroups, dstate), compute dtype.
    Returns y like x. The length is padded to a multiple of chunk_size here: a zero input with
    zero log decay neither adds to the state nor changes it.
    """
    batch, length, nheads, headdim = x.shape
    ngroups = b.shape[2]
    pad = -length % chunk_size
    if pad:
        x, b, c = (F.pad(t, (0, 0, 0, 0, 0, pad)) for t in (x, b, c))
        log_decay = F.pad(log_decay, (0, 0, 0, pad))
    nchunks = (length + pad) // chunk_size
    heads_per_group = nheads // ngroups
    # (batch, chunk, position, group, head in group, ...)
    xs = x.reshape(batch, nchunks, chunk_size, ngroups, heads_per_group, headdim)
    bs = b.reshape(batch, nchunks, chunk_size, ngroups, -1)
    cs = c.reshape(batch, nchunks, chunk_size, ngroups, -1)
    decay = log_decay.reshape(batch, nchunks, chunk_size, ngroups, heads_per_group)
    decay = decay.permute(0, 1, 3, 4, 2)  # (batch, chunk, group, head, position)
    running = decay.cumsum(-1)
    total = running[..., -1]  # (batch, chunk, group, head)

    # 1. Diagonal blocks: inputs of the same chunk.
    scores = torch.einsum("zltgn,zlsgn->zlgts", cs, bs)
    weights = scores[:, :, :, None] * segment_sums(decay).exp().to(x.dtype)
    y = torch.einsum("zlghts,zlsghp->zltghp", weights, xs)

    # 2. What each chunk adds to the state at its end.
    to_end = (total[..., None] - running).exp().to(x.dtype).permute(0, 1, 4, 2, 3)
    added = torch.einsum("zlsgn,zlsghp->zlghpn", bs, xs * to_end[..., None])

    # 3. States at chunk starts: the same kind of matrix, one row per chunk. Shifted by one,
    #    because a chunk sees what the chunks before it added.
    between = segment_sums(F.pad(total, (0, 0, 0, 0, 1, 0)).permute(0, 2, 3, 1)).exp()
    carry = between[..., :-1, 1:].to(x.dtype)  # [start of l, end of k], zero unless k < l
    states = torch.einsum("zghlk,zkghpn->zlghpn", carry, added)

    # 4. Each row reads the state at its chunk's start, decayed to its position.
    from_start = running.exp().to(x.dtype).permute(0, 1, 4, 2, 3)
    y = y + torch.einsum("zltgn,zlghpn->zltghp", cs, states) * from_start[..., None]
    return y.reshape(batch, length + pad, nheads, headdim)[:, :length]


def ssd_recurrent(x: Tensor, log_decay: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """The recurrence, one position at a time. Shapes as in `ssd_blocks`."""
    batch, length, nheads, headdim = x.shape
    heads_per_group = nheads // b.shape[2]
    b = b.repeat_interleave(heads_per_group, dim=2)
    c = c.repeat_interleave(heads_per_group, dim=2)
    state = x.new_zeros(batch, nheads, headdim, b.shape[-1])
    rows = []
    for t in range(length):
        outer = x[:, t, :, :, None] * b[:, t, :, None, :]
        state = state * log_decay[:, t].exp()[..., None, None] + outer
        rows.append((state * c[:, t, :, None, :]).sum(-1))
    return torch.stack(rows, dim=1)
