"""The one-process engine over a model directory: the oracle of the cluster."""

from __future__ import annotations

from pathlib import Path

from stateferry.colocated.engine import ColocatedEngine
from stateferry.config import (
    NO_SPECULATION,
    CacheSection,
    ModelSection,
    SpeculationSection,
    WorkerSection,
)
from stateferry.worker.parts import EngineParts, build_engine

# Every prompt is computed.
NO_CACHE = CacheSection(enabled=False)


def local_engine(
    model_dir: Path,
    *,
    max_requests: int = 16,
    budget_tokens: int = 512,
    grid: int = 0,
    max_context_tokens: int = 2048,
    memory_bytes: int = 0,
    cache: CacheSection = NO_CACHE,
    overlap: bool = False,
    speculation: SpeculationSection = NO_SPECULATION,
) -> tuple[ColocatedEngine, EngineParts]:
    """An engine whose pools are full of NaN, so that a read of unwritten memory shows."""
    parts = build_engine(
        model_dir,
        ModelSection(grid_tokens=grid, max_context_tokens=max_context_tokens),
        WorkerSection(max_requests=max_requests, memory_bytes=memory_bytes),
        cache,
        speculation=speculation,
    )
    parts.cache.pools.poison()
    engine = ColocatedEngine(
        parts.runner,
        parts.cache,
        parts.rules,
        grid=parts.grid,
        budget_tokens=budget_tokens,
        overlap=overlap,
        speculator=parts.speculator,
    )
    return engine, parts
