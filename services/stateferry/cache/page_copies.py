"""The copies that the cache asks for, done on the pools' tensors."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from stateferry.cache.page_copy import HostBlob, Kind, PageCopy
from stateferry.cache.pools import SequencePools
from stateferry.core.errors import InvariantViolation


def run_copies(pools: SequencePools, copies: Iterable[PageCopy]) -> None:
    """Do what sequences need that resume in the middle of an interval, and what moves to host
    memory or back, on the current stream and before the launch that reads or overwrites it.
    Mutates the targets; waits for copies to host memory."""
    for copy in copies:
        source, target = copy.source, copy.target
        if isinstance(source, HostBlob):
            assert not isinstance(target, HostBlob)
            _bring_in(_parts(pools, copy.kind, target, copy.rows), source)
        elif isinstance(target, HostBlob):
            parts = _parts(pools, copy.kind, source, copy.rows)
            target.content = tuple(_host_copy(part) for part in parts)
        elif copy.kind == "tail":
            pools.states.copy_tail(source, target, copy.rows)
        else:
            assert copy.kind == "kv"
            pools.kv.copy_page(source, target, copy.rows)


def _bring_in(parts: list[torch.Tensor], blob: HostBlob) -> None:
    if blob.content is None:
        raise InvariantViolation("what was never copied to host memory cannot come back")
    assert isinstance(blob.content, tuple)
    for part, saved in zip(parts, blob.content, strict=True):
        part.copy_(saved)


def _host_copy(part: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(part, device="cpu", memory_format=torch.contiguous_format).copy_(part)


def _parts(pools: SequencePools, kind: Kind, number: int, rows: int) -> list[torch.Tensor]:
    """What lies in a place, as views."""
    if kind == "state":
        return pools.states.slot_tensors(number)
    if kind == "tail":
        return pools.states.tail_tensors(number, rows)
    return [pools.kv.page_tensor(number, rows)]
