"""The copies that the cache asks for, done on the pools' tensors."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from stateferry.cache.host_tier import Kind
from stateferry.cache.hybrid_cache import PageCopy
from stateferry.cache.pools import SequencePools


def run_copies(pools: SequencePools, copies: Iterable[PageCopy]) -> None:
    """Do what a sequence that resumes in the middle of an interval needs, on the current stream
    and before the launch that reads it. Mutates the targets."""
    for copy in copies:
        if copy.kind == "tail":
            pools.states.copy_tail(copy.source, copy.target, copy.rows)
        else:
            pools.kv.copy_page(copy.source, copy.target, copy.rows)


class TensorCopier:
    """Moves states, tails and KV pages between the pools and tensors in host memory."""

    def __init__(self, pools: SequencePools) -> None:
        self._pools = pools

    def save(self, kind: Kind, number: int, rows: int) -> tuple[object, int]:
        """As in HostCopier. Waits for the copy."""
        parts = self._parts(kind, number, rows)
        saved = tuple(torch.empty_like(p, device="cpu", memory_format=_PACKED) for p in parts)
        for part, place in zip(parts, saved, strict=True):
            place.copy_(part)
        return saved, sum(place.nbytes for place in saved)

    def load(self, kind: Kind, number: int, rows: int, blob: object) -> None:
        """As in HostCopier."""
        assert isinstance(blob, tuple)
        for part, saved in zip(self._parts(kind, number, rows), blob, strict=True):
            part.copy_(saved)

    def _parts(self, kind: Kind, number: int, rows: int) -> list[torch.Tensor]:
        if kind == "state":
            return self._pools.states.slot_tensors(number)
        if kind == "tail":
            return self._pools.states.tail_tensors(number, rows)
        return [self._pools.kv.page_tensor(number, rows)]


_PACKED = torch.contiguous_format
