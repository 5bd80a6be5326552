"""The one-process engine with drafts and without, in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.spec.tasks import Task
from stateferry.colocated.engine import ColocatedEngine
from stateferry.config import CacheSection, ModelSection, SpeculationSection, WorkerSection
from stateferry.core.request import GenerationRequest
from stateferry.drafting.speculator import Speculator
from stateferry.worker.parts import EngineParts, build_engine

CONTEXT = 2048


@dataclass(frozen=True, slots=True)
class Duel:
    """Tokens per second with drafts (on) and without (off), medians of the rounds; ``ratio`` is the
    median of the rounds' ratios."""

    task: str
    batch: int
    on: float
    off: float
    ratio: float
    acceptance: float
    drafted: int
    mismatches: int


@dataclass
class Contender:
    """One engine."""

    engine: ColocatedEngine
    parts: EngineParts

    @classmethod
    def of(
        cls, model_dir: Path, batch: int, threads: int, drafter: SpeculationSection
    ) -> Contender:
        parts = build_engine(
            model_dir,
            ModelSection(max_context_tokens=CONTEXT),
            WorkerSection(max_requests=batch, threads=threads),
            CacheSection(enabled=False),
            speculation=drafter,
        )
        return cls(_engine(parts, parts.speculator), parts)

    def always_drafting(self) -> Contender:
        """The same, whether drafts pay or not."""
        most = self.parts.speculator.most_guesses if self.parts.speculator else 0
        speculator = Speculator(most, pays=lambda trusts, guesses, cost: list(guesses))
        return Contender(_engine(self.parts, speculator), self.parts)

    def answer(self, requests: Sequence[GenerationRequest]) -> tuple[float, list[list[int]]]:
        """Seconds of decoding, from when all have their first token, and what was said."""
        for request in requests:
            self.engine.submit(request)
        outputs = self.engine.outputs
        while any(not outputs[request.request_id].tokens for request in requests):
            self.engine.step()
        began_s = time.perf_counter()
        while self.engine.num_unfinished:
            self.engine.step()
        took_s = time.perf_counter() - began_s
        return took_s, [outputs.pop(request.request_id).token_ids for request in requests]


def _engine(parts: EngineParts, speculator: Speculator | None) -> ColocatedEngine:
    return ColocatedEngine(
        parts.runner,
        parts.cache,
        parts.rules,
        grid=parts.grid,
        budget_tokens=CONTEXT,
        speculator=speculator,
    )


def run_duels(
    on: Contender,
    off: Contender,
    todo: Sequence[Task],
    batches: Sequence[int],
    *,
    output_tokens: int,
    rounds: int,
    seed: int,
    show: Callable[[Duel], None],
) -> list[Duel]:
    """All tasks at all batches. The first round warms up and is not counted."""
    duels = []
    for task in todo:
        for batch in batches:
            requests = task.requests(batch, output_tokens, seed)
            duels.append(_duel(on, off, task, requests, rounds))
            show(duels[-1])
    return duels


def _duel(
    on: Contender, off: Contender, task: Task, requests: Sequence[GenerationRequest], rounds: int
) -> Duel:
    speculator = on.parts.speculator
    assert speculator is not None
    counts = speculator.counts
    drafted, accepted = counts.drafted, counts.accepted
    rates: dict[str, list[float]] = {"on": [], "off": []}
    mismatches = 0
    for number in range(rounds + 1):
        said: dict[str, list[list[int]]] = {}
        names = ("on", "off") if number % 2 else ("off", "on")
        for name in names:
            took_s, said[name] = (on if name == "on" else off).answer(requests)
            if number:
                # Of each answer the first token comes before.
                tokens = sum(len(ids) - 1 for ids in said[name])
                rates[name].append(tokens / took_s)
        mismatches += sum(a != b for a, b in zip(said["on"], said["off"], strict=True))
    drafted, accepted = counts.drafted - drafted, counts.accepted - accepted
    return Duel(
        task.name,
        len(requests),
        statistics.median(rates["on"]),
        statistics.median(rates["off"]),
        statistics.median(a / b for a, b in zip(rates["on"], rates["off"], strict=True)),
        accepted / drafted if drafted else 0.0,
        drafted,
        mismatches,
    )
