"""The one-process engine under a clock. ours_child.py imports it from its own folder."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stateferry.colocated.engine import ColocatedEngine
from stateferry.config import CacheSection, ModelSection, WorkerSection
from stateferry.core.request import GenerationRequest
from stateferry.core.sampling import SamplingParams, StopConditions
from stateferry.worker.parts import EngineParts, build_engine

_GREEDY = SamplingParams(temperature=0.0, top_k=0, top_p=1.0, seed=0, logprobs=None)


@dataclass(frozen=True)
class Timed:
    """Seconds until every prompt had its first token, and after that; how many tokens came after
    it, and all of them by prompt."""

    first_s: float
    rest_s: float
    rest_tokens: int
    token_ids: list[list[int]]


def uncached_engine(
    model_dir: Path, model: ModelSection, worker: WorkerSection
) -> tuple[ColocatedEngine, EngineParts]:
    """Every prompt is computed, also one that comes again."""
    parts = build_engine(model_dir, model, worker, CacheSection(enabled=False))
    engine = ColocatedEngine(
        parts.runner,
        parts.cache,
        parts.rules,
        grid=parts.grid,
        budget_tokens=worker.extend_budget_tokens,
    )
    return engine, parts


def run_timed(engine: ColocatedEngine, prompts: Sequence[Sequence[int]], new_tokens: int) -> Timed:
    """All prompts at once, greedy, ``new_tokens`` each."""
    stop = StopConditions(new_tokens, 0, frozenset())
    names = [str(number) for number in range(len(prompts))]
    requests = [
        GenerationRequest(name, tuple(ids), _GREEDY, stop)
        for name, ids in zip(names, prompts, strict=True)
    ]
    start = time.perf_counter()
    for request in requests:
        engine.submit(request)
    outputs = [engine.outputs[name] for name in names]
    while not all(output.tokens for output in outputs):
        engine.step()
    first = time.perf_counter()
    # A step decodes as well: some tokens after the first are there already.
    before = sum(len(output.tokens) for output in outputs)
    while engine.num_unfinished:
        engine.step()
    end = time.perf_counter()
    for name in names:
        del engine.outputs[name]
    token_ids = [output.token_ids for output in outputs]
    return Timed(first - start, end - first, sum(map(len, token_ids)) - before, token_ids)
