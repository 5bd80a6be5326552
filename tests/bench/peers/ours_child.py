"""Ours as a contender: the one-process engine, with the schedulers, pools and sampler that workers
have. Started by contenders.py, not by hand."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from child_loop import Sample, serve

import stateferry
from stateferry.colocated.engine import ColocatedEngine
from stateferry.config import CacheSection, ModelSection, WorkerSection
from stateferry.core.request import GenerationRequest
from stateferry.core.sampling import SamplingParams, StopConditions
from stateferry.worker.parts import build_engine

_GREEDY = SamplingParams(temperature=0.0, top_k=0, top_p=1.0, seed=0, logprobs=None)


def load(request: dict[str, Any]) -> tuple[str, int, Sample]:
    worker = WorkerSection(threads=request["threads"], max_requests=request["max_batch"])
    model = ModelSection(dtype=request["dtype"], max_context_tokens=request["max_context"])
    # The same prompts come again: nothing may be left of them.
    cache = CacheSection(enabled=False)
    parts = build_engine(Path(request["checkpoint"]), model, worker, cache)
    engine = ColocatedEngine(
        parts.runner,
        parts.cache,
        parts.rules,
        grid=parts.grid,
        budget_tokens=worker.extend_budget_tokens,
    )

    def sample(prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
        return _sample(engine, prompts, new_tokens)

    version = f"{stateferry.__version__} ({parts.kernels} kernels)"
    return version, parts.limits.vocab_size, sample


def _sample(engine: ColocatedEngine, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
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
    return {
        "first_s": first - start,
        "rest_s": end - first,
        "rest_tokens": sum(len(output.tokens) for output in outputs) - before,
        "tokens": [output.token_ids[:8] for output in outputs],
    }


if __name__ == "__main__":
    serve(load)
