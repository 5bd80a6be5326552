"""Cuts one sequence's state into what the workers of a tensor-parallel group hold, and joins it.

Between groups of other sizes a state goes through its whole: rank by rank, only the ranges that the
two have in common are copied. Heads are split evenly. B and C have groups instead of heads: each
rank holds the groups that its heads use, so with fewer groups than ranks several ranks hold the
same ones. x, B and C lie behind one another in a convolution's columns and are cut one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from stateferry.core.errors import ConfigError, FrameError
from stateferry_kernels.kv_layer import KvGeometry
from stateferry_kernels.layer_state import StateGeometry

# The dimension that is cut, counted from the end: a layer's part, or all layers' stacked.
_HEAD_DIMS = {"ssm_state": -3, "tail_x": -2, "tail_dt": -1}
_GROUP_DIMS = {"tail_B": -2}
_CONV_DIMS = {"conv_state": -2, "tail_xBC": -1}
# Pages are (pages, 2, kv_heads, page_tokens, head_dim), written places (2, kv_heads, rows, ..).
_KV_DIMS = {"kv_pages": -3, "kv_rows": -3}


@dataclass(frozen=True, slots=True)
class Cut:
    """Which ``ranges`` of dimension ``dim`` (negative) a rank holds, one behind the other."""

    dim: int
    ranges: tuple[range, ...]

    @property
    def size(self) -> int:
        return sum(map(len, self.ranges))


def cut_of(kind: str, rank: int, degree: int, state: StateGeometry, kv: KvGeometry) -> Cut:
    """What rank ``rank`` of ``degree`` holds of a segment of ``kind``, of geometries that are the
    whole's. Raises ConfigError when they cannot be split so, FrameError for an unknown kind."""
    if not 0 <= rank < degree:
        raise ConfigError("tensor_parallel", f"rank {rank} of {degree}")
    if kind in _HEAD_DIMS:
        return Cut(_HEAD_DIMS[kind], (_even(state.nheads, rank, degree, "nheads"),))
    if kind in _GROUP_DIMS:
        return Cut(_GROUP_DIMS[kind], (_shared(state.ngroups, rank, degree, "ngroups"),))
    if kind in _CONV_DIMS:
        return Cut(_CONV_DIMS[kind], _conv_ranges(state, rank, degree))
    if kind in _KV_DIMS:
        return Cut(_KV_DIMS[kind], (_shared(kv.kv_heads, rank, degree, "kv_heads"),))
    raise FrameError(f"{kind!r} is no part of a sequence's state")


def take(whole: torch.Tensor, cut: Cut) -> torch.Tensor:
    """A rank's share, contiguous and a copy."""
    pieces = [whole.narrow(cut.dim, part.start, len(part)) for part in cut.ranges]
    return torch.cat(pieces, dim=cut.dim)


def join(shares: Sequence[torch.Tensor], cuts: Sequence[Cut]) -> torch.Tensor:
    """The whole from every rank's share, in order of rank; what several hold must be equal to the
    byte. Raises FrameError if not, or if a share has another size than its cut."""
    dim = cuts[0].dim
    total = max(part.stop for cut in cuts for part in cut.ranges)
    shape = list(shares[0].shape)
    shape[dim] = total
    whole = torch.empty(shape, dtype=shares[0].dtype, device=shares[0].device)
    written = [False] * total
    for rank, (share, cut) in enumerate(zip(shares, cuts, strict=True)):
        if share.shape[dim] != cut.size:
            raise FrameError(f"rank {rank} sent {share.shape[dim]} of {cut.size}")
        start = 0
        for part in cut.ranges:
            piece = share.narrow(dim, start, len(part))
            start += len(part)
            target = whole.narrow(dim, part.start, len(part))
            if written[part.start]:
                if not _same_bytes(target, piece):
                    raise FrameError(f"rank {rank} differs in what it shares with another")
                continue
            target.copy_(piece)
            written[part.start : part.stop] = [True] * len(part)
    if not all(written):
        raise FrameError("the ranks' shares leave a gap")
    return whole


def overlaps(ours: Cut, theirs: Cut) -> tuple[tuple[int, int, int], ...]:
    """(start in our share, start in theirs, length) of every range that both hold: what one rank
    has to send to another of a group of another size."""
    found = []
    mine_at = 0
    for mine in ours.ranges:
        their_at = 0
        for other in theirs.ranges:
            start, stop = max(mine.start, other.start), min(mine.stop, other.stop)
            if start < stop:
                mine_start = mine_at + start - mine.start
                found.append((mine_start, their_at + start - other.start, stop - start))
            their_at += len(other)
        mine_at += len(mine)
    return tuple(found)


def _conv_ranges(state: StateGeometry, rank: int, degree: int) -> tuple[range, ...]:
    """x by head, then B and C by group, each behind the one before."""
    heads = _even(state.nheads, rank, degree, "nheads")
    groups = _shared(state.ngroups, rank, degree, "ngroups")
    inner, width = state.nheads * state.headdim, state.ngroups * state.dstate
    x = range(heads.start * state.headdim, heads.stop * state.headdim)
    b, c = (
        range(first + groups.start * state.dstate, first + groups.stop * state.dstate)
        for first in (inner, inner + width)
    )
    return x, b, c


def _even(count: int, rank: int, degree: int, name: str) -> range:
    if count % degree:
        raise ConfigError("tensor_parallel", f"{name} = {count} is no multiple of {degree}")
    size = count // degree
    return range(rank * size, (rank + 1) * size)


def _shared(count: int, rank: int, degree: int, name: str) -> range:
    """As ``_even``; with fewer than ranks, neighbouring ranks hold the same one."""
    if count >= degree:
        return _even(count, rank, degree, name)
    if degree % count:
        raise ConfigError("tensor_parallel", f"{degree} is no multiple of {name} = {count}")
    one = rank * count // degree
    return range(one, one + 1)


def _same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    """NaN included."""
    pair = (tensor.contiguous().view(torch.uint8) for tensor in (one, other))
    return torch.equal(*pair)
