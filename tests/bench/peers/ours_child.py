"""Ours as a contender: the one-process engine, with the schedulers, pools and sampler that workers
have. Started by contenders.py, not by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from child_loop import Sample, serve
from own_engine import run_timed, uncached_engine

import stateferry
from stateferry.config import ModelSection, WorkerSection


def load(request: dict[str, Any]) -> tuple[str, int, Sample]:
    worker = WorkerSection(threads=request["threads"], max_requests=request["max_batch"])
    model = ModelSection(dtype=request["dtype"], max_context_tokens=request["max_context"])
    engine, parts = uncached_engine(Path(request["checkpoint"]), model, worker)

    def sample(prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
        timed = run_timed(engine, prompts, new_tokens)
        return {
            "first_s": timed.first_s,
            "rest_s": timed.rest_s,
            "rest_tokens": timed.rest_tokens,
            "tokens": [ids[:8] for ids in timed.token_ids],
        }

    version = f"{stateferry.__version__} ({parts.kernels} kernels)"
    return version, parts.limits.vocab_size, sample


if __name__ == "__main__":
    serve(load)
