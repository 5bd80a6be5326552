"""A runner without a model: tokens by rule, steps that wait, fail or give no token on demand."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

from stateferry.cache.page_copy import PageCopy
from stateferry.core.sampling import SampledToken
from stateferry.engine.forward_batch import DecodeBatch, ExtendBatch
from stateferry.engine.launch import Launch, Over, Planned
from support.small_cache import GRID


class ScriptedRunner:
    """Answers token 7 everywhere. ``before`` runs on the engine's thread, before each step; it may
    block or raise. ``broken_indices`` are output tokens that come out as not trustworthy."""

    def __init__(self) -> None:
        self.before: Callable[[], None] = lambda: None
        self.broken_indices: set[int] = set()
        self.steps = 0
        # Made so far, in order.
        self.copies: list[PageCopy] = []
        # Of decode steps: what each row consumed.
        self.consumed: list[list[int]] = []
        self.planned: list[ExtendBatch | DecodeBatch] = []

    def extend(self, batch: ExtendBatch) -> Launch:
        self._plan(batch)

        def start() -> Over:
            self._step()
            for row in batch.rows:
                row.lease.final = object()
            samples = [row.sample for row in batch.rows if row.sample is not None]
            return Over([self._token(sample.index) for sample in samples])

        return Planned(start)

    def decode(self, batch: DecodeBatch) -> Launch:
        self._plan(batch)

        def start() -> Over:
            self._step()
            self.consumed.append(batch.token_ids())
            tokens = [self._token(row.sample.index) for row in batch.rows]
            for row, token in zip(batch.rows, tokens, strict=True):
                if token is not None:
                    row.sampled.come_out(token.token_id)
            return Over(tokens)

        return Planned(start)

    def copy(self, copies: Iterable[PageCopy]) -> None:
        self.copies += copies

    def _plan(self, batch: ExtendBatch | DecodeBatch) -> None:
        batch.advance(GRID)
        self.planned.append(batch)

    def _step(self) -> None:
        self.steps += 1
        self.before()

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

    def observe_gap(self, kind: str, seconds: float) -> None:
        return None

    def preempted(self, sequences: int, recomputed_tokens: int) -> None:
        return None

    def handoff_sealed(self, size_bytes: int, seconds: float) -> None:
        return None

    def handoff_failed(self) -> None:
        return None
