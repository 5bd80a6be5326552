"""One model's engine in its simplest form, and what others are held against it."""

from __future__ import annotations

import struct
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

from stateferry.cache.cache_counters import CacheCounters
from stateferry.colocated.engine import ColocatedEngine, Output
from stateferry.config import CacheSection, ModelSection, WorkerSection
from stateferry.core.request import GenerationRequest
from stateferry.core.sampling import SampledToken
from stateferry.worker.parts import build_engine

CONTEXT = 1024
WHOLE = 1 << 20

Bits = tuple[tuple[int, bytes], ...]


class PathNotTaken(Exception):
    """A case did not meet the hazard that it is there for."""


@dataclass
class Tally:
    """Of one model. ``paths`` counts comparisons by the hazard they met."""

    comparisons: int = 0
    mismatches: list[str] = field(default_factory=list)
    paths: Counter[str] = field(default_factory=Counter)

    def compare(self, path: str, what: str, found: Bits, wanted: Bits) -> None:
        self.comparisons += 1
        self.paths[path] += 1
        if found != wanted:
            pairs = enumerate(zip(found, wanted, strict=False))
            at = next((n for n, (ours, theirs) in pairs if ours != theirs), -1)
            self.mismatches.append(f"{path}: {what}: differs at output token {at}")

    def add(self, other: Tally, variant: str) -> None:
        """What was compared in another variant of the engine."""
        self.comparisons += other.comparisons
        self.mismatches += [f"{variant}: {text}" for text in other.mismatches]
        self.paths.update({f"{path}, {variant}": n for path, n in other.paths.items()})


class Engine:
    """A one-process engine over memory that was full of NaN before."""

    def __init__(
        self,
        model_dir: Path,
        dtype: str,
        grid: int,
        *,
        cached: bool = True,
        budget: int = WHOLE,
        cache_bytes: int = 64 << 20,
        max_requests: int = 8,
        overlap: bool = False,
    ) -> None:
        parts = build_engine(
            model_dir,
            ModelSection(dtype=dtype, grid_tokens=grid, max_context_tokens=CONTEXT),
            WorkerSection(max_requests=max_requests),
            CacheSection(enabled=cached, memory_bytes=cache_bytes, tokens_per_state=128),
        )
        parts.cache.pools.poison()
        self.grid = parts.grid
        self.cache = parts.cache
        self.vocab_size = parts.limits.vocab_size
        self.engine = ColocatedEngine(
            parts.runner,
            parts.cache,
            parts.rules,
            grid=parts.grid,
            budget_tokens=budget,
            overlap=overlap,
        )
        self._overlap = overlap
        self._number = 0

    @property
    def counters(self) -> CacheCounters:
        return self.cache.prefixes.counters

    def run(self, *requests: GenerationRequest, preempt_at: int = 0) -> list[Bits]:
        """All at once. ``preempt_at``: each loses its memory when it has so many tokens."""
        names = []
        for request in requests:
            self._number += 1
            names.append(f"{self._number}")
            self.engine.submit(replace(request, request_id=names[-1]))
        outputs = self.engine.outputs
        left = set(names) if preempt_at else set()
        before = self.engine.num_overlapped
        while self.engine.num_unfinished:
            self.engine.step()
            due = [name for name in left if len(outputs[name].tokens) >= preempt_at]
            for name in due:
                left.discard(name)
                if not self.engine.preempt(name):
                    raise PathNotTaken(f"{name} ended before {preempt_at} tokens")
        if left:
            raise PathNotTaken(f"{left} were not preempted")
        if self._overlap and before == self.engine.num_overlapped and self._can_overlap(requests):
            raise PathNotTaken("no step was planned while another ran")
        self.cache.check_conserved()
        return [bits_of(outputs.pop(name)) for name in names]

    def _can_overlap(self, requests: tuple[GenerationRequest, ...]) -> bool:
        """One token more than the first is a step that nothing can be planned beside."""
        return any(request.stop.max_tokens > 2 for request in requests)


def bits_of(output: Output) -> Bits:
    return tuple((token.token_id, _bytes(token)) for token in output.tokens)


def _bytes(token: SampledToken) -> bytes:
    """The log-probability, as the wire carries it."""
    if token.logprob is None:
        raise PathNotTaken("a token came without its log-probability")
    return struct.pack("<f", token.logprob)
