"""A runner without a model: tokens by rule, steps that wait, fail or give no token on demand."""

from __future__ import annotations

import threading
from collections.abc import Callable

from stateferry.cache.hybrid_cache import PageCopy
from stateferry.core.sampling import SampledToken
from stateferry.engine.forward_batch import DecodeBatch, ExtendBatch
from support.small_cache import GRID


class ScriptedRunner:
    """Answers token 7 everywhere. ``before`` runs on the engine's thread, before each step; it may
    block or raise. ``broken_indices`` are output tokens that come out as not trustworthy."""

    def __init__(self) -> None:
        self.before: Callable[[], None] = lambda: None
        self.broken_indices: set[int] = set()
        self.steps = 0
        # Made so far, in order: a step that fails before it is computed makes none.
        self.copies: list[PageCopy] = []

    def extend(self, batch: ExtendBatch) -> list[SampledToken | None]:
        self._step(batch)
        for row in batch.rows:
            row.lease.advance(len(row.token_ids), GRID)
            row.lease.final = object()
        return [self._token(row.sample.index) for row in batch.rows if row.sample is not None]

    def decode(self, batch: DecodeBatch) -> list[SampledToken | None]:
        self._step(batch)
        for row in batch.rows:
            row.lease.advance(1, GRID)
        return [self._token(row.sample.index) for row in batch.rows]

    def _step(self, batch: ExtendBatch | DecodeBatch) -> None:
        self.steps += 1
        self.before()
        self.copies += batch.copies

    def _token(self, index: int) -> SampledToken | None:
        return None if index in self.broken_indices else SampledToken(7)


class Gate:
    """Blocks the engine's thread until ``open``; says when somebody is waiting."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self._opened = threading.Event()

    def __call__(self) -> None:
        self.entered.set()
        if not self._opened.wait(10):
            raise TimeoutError("the test never opened the gate")

    def open(self) -> None:
        self._opened.set()


class NullMeter:
    """Measures nothing."""

    def observe_step(self, kind: str, seconds: float, rows: int, tokens: int) -> None:
        return None

    def handoff_sealed(self, size_bytes: int, seconds: float) -> None:
        return None

    def handoff_failed(self) -> None:
        return None
