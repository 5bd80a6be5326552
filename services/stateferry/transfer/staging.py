"""Bounded memory for hand-offs in flight, handed out first come, first served."""

from __future__ import annotations

import asyncio
import contextlib
import mmap
from collections import deque
from dataclasses import dataclass

import numpy as np

from stateferry.core.errors import Overloaded
from stateferry.transfer.blocking import Bytes, run_sized

_MIN_BLOCK_BYTES = 64 << 10
_HUGE_PAGE_BYTES = 2 << 20


class StagingBlock:
    """A run of staging memory, ``data``; give it back once, with one of the two methods.

    Both are idempotent. ``data`` must not be touched afterwards.
    """

    def __init__(self, pool: StagingPool, memory: Bytes, size_bytes: int) -> None:
        self.data = memory[:size_bytes]
        self._pool = pool
        self._memory: Bytes | None = memory

    def release(self) -> None:
        """Give the memory back for the next hand-off."""
        if self._memory is not None:
            memory, self._memory = self._memory, None
            self._pool._give_back(memory, reusable=True)

    def retire(self) -> None:
        """Give the room back but never reuse the memory: a late reader finds it unmapped."""
        if self._memory is not None:
            memory, self._memory = self._memory, None
            del self.data
            self._pool._give_back(memory, reusable=False)


@dataclass(slots=True, eq=False)
class _Waiter:
    capacity_bytes: int
    grant: asyncio.Future[Bytes | None]


class StagingPool:
    """At most ``budget_bytes`` of memory, in use or kept for reuse.

    Blocks are reused because the first touch of fresh memory costs more than the copy into it.
    Each block is a mapping of its own, so that a retired one really goes away.
    """

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self._in_use_bytes = 0
        self._free: list[Bytes] = []
        self._waiters: deque[_Waiter] = deque()

    @property
    def in_use_bytes(self) -> int:
        return self._in_use_bytes

    @property
    def mapped_bytes(self) -> int:
        return self._in_use_bytes + sum(memory.size for memory in self._free)

    async def acquire(self, size_bytes: int, timeout_s: float) -> StagingBlock:
        """A block of ``size_bytes``, all of it in memory already.

        Raises Overloaded when it cannot fit, or when no room came free within ``timeout_s``.
        """
        if size_bytes > self.budget_bytes:
            raise Overloaded(f"{size_bytes} bytes never fit in {self.budget_bytes} of staging")
        waiter = _Waiter(
            min(_round_up(size_bytes), self.budget_bytes),
            asyncio.get_running_loop().create_future(),
        )
        self._waiters.append(waiter)
        self._serve()
        try:
            async with asyncio.timeout(timeout_s):
                memory = await waiter.grant
        except BaseException as error:
            self._leave(waiter)
            if isinstance(error, TimeoutError):
                raise Overloaded(f"no staging became free within {timeout_s} s") from error
            raise
        if memory is None:
            memory = await self._map(waiter.capacity_bytes)
        return StagingBlock(self, memory, size_bytes)

    async def _map(self, capacity_bytes: int) -> Bytes:
        try:
            return await run_sized(capacity_bytes, lambda: _fresh_memory(capacity_bytes))
        except BaseException:
            self._in_use_bytes -= capacity_bytes
            self._serve()
            raise

    def _leave(self, waiter: _Waiter) -> None:
        """Forget a waiter that gave up, even if it was served in the same moment."""
        if waiter in self._waiters:
            self._waiters.remove(waiter)
        if waiter.grant.done() and not waiter.grant.cancelled():
            memory = waiter.grant.result()
            self._in_use_bytes -= waiter.capacity_bytes if memory is None else memory.size
            if memory is not None:
                self._free.append(memory)
        self._serve()

    def _give_back(self, memory: Bytes, *, reusable: bool) -> None:
        self._in_use_bytes -= memory.size
        if reusable:
            self._free.append(memory)
        self._serve()

    def _serve(self) -> None:
        while self._waiters:
            waiter = self._waiters[0]
            if not waiter.grant.done() and not self._grant(waiter):
                return
            self._waiters.popleft()

    def _grant(self, waiter: _Waiter) -> bool:
        wanted = waiter.capacity_bytes
        fitting = [memory for memory in self._free if wanted <= memory.size <= 2 * wanted]
        if fitting:
            best = min(fitting, key=lambda memory: memory.size)
            # `remove` would compare arrays by value.
            self._free = [memory for memory in self._free if memory is not best]
            self._in_use_bytes += best.size
            waiter.grant.set_result(best)
            return True
        if self._in_use_bytes + wanted > self.budget_bytes:
            return False
        while self.mapped_bytes + wanted > self.budget_bytes:
            self._free.pop(0)
        self._in_use_bytes += wanted
        waiter.grant.set_result(None)
        return True


def _round_up(size_bytes: int) -> int:
    """To one of eight sizes per power of two, so that like hand-offs share blocks."""
    step = max(_MIN_BLOCK_BYTES, 1 << max(0, size_bytes.bit_length() - 4))
    return max(step, -(-size_bytes // step) * step)


def _fresh_memory(capacity_bytes: int) -> Bytes:
    mapping = mmap.mmap(-1, capacity_bytes)
    if capacity_bytes >= _HUGE_PAGE_BYTES and hasattr(mmap, "MADV_HUGEPAGE"):
        # A request that a kernel without large pages declines.
        with contextlib.suppress(OSError):
            mapping.madvise(mmap.MADV_HUGEPAGE)
    memory = np.frombuffer(mapping, dtype=np.uint8)
    memory.fill(0)
    return memory
