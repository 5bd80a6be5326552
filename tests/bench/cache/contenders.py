"""One model under each policy, in the same memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bench.cache.policies import Policy, Share, cut
from stateferry.cache.cache_counters import CacheCounters
from stateferry.cache.hybrid_cache import CacheOptions
from stateferry.cache.pools import SequencePools, build_pools
from stateferry.cache.state_cache import StateCache
from stateferry.colocated.engine import ColocatedEngine
from stateferry.config import CacheSection, ModelSection, WorkerSection
from stateferry.core.worker import PoolSizes
from stateferry.engine.runner import ModelRunner
from stateferry.models.registry import load_model
from stateferry.worker.device import pick_device
from stateferry.worker.parts import EngineParts, build_engine

# Prompt tokens of one forward: the default of workers.
BUDGET_TOKENS = WorkerSection().extend_budget_tokens


@dataclass(frozen=True)
class Setup:
    """Of all contenders. ``memory_bytes`` hold states, tails, keys and values of running sequences
    and of what is cached."""

    model_dir: Path
    memory_bytes: int
    context_tokens: int
    max_requests: int = 4
    threads: int = 2

    def parts(self, cached: CacheSection) -> EngineParts:
        return build_engine(
            self.model_dir,
            ModelSection(max_context_tokens=self.context_tokens),
            WorkerSection(
                max_requests=self.max_requests,
                memory_bytes=self.memory_bytes,
                threads=self.threads,
                device="cpu",
            ),
            cached,
        )


class Bench:
    """Caches and engines of one setup. Building pools costs nothing before they are written."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self._ours = setup.parts(CacheSection())
        self._seats = setup.parts(CacheSection(memory_bytes=0)).sizes
        self._runners: dict[str, tuple[Share | None, ModelRunner, SequencePools]] = {}

    @property
    def vocab_size(self) -> int:
        return self._ours.limits.vocab_size

    @property
    def grid(self) -> int:
        return self._ours.grid

    def sizes(self, share: Share | None) -> PoolSizes:
        """None: as the settings' defaults cut the memory."""
        if share is None:
            return self._ours.sizes
        return cut(self._seats, self.setup.memory_bytes, share)

    def dry(
        self, policy: Policy, share: Share | None, options: CacheOptions | None = None
    ) -> StateCache:
        """A cache over pools without memory."""
        return self._cache(policy, share, self._pools(share, "meta"), options)

    def engine(
        self, policy: Policy, share: Share | None, *, overlap: bool = False
    ) -> tuple[ColocatedEngine, StateCache]:
        """A real one with an empty cache, over the pools that the last one of this policy had."""
        known = self._runners.get(policy.name)
        if known is None or known[0] != share:
            known = self._runners[policy.name] = (share, *self._runner(share))
        cache = self._cache(policy, share, known[2], None)
        engine = ColocatedEngine(
            known[1],
            cache,
            self._ours.rules,
            grid=self.grid,
            budget_tokens=BUDGET_TOKENS,
            overlap=overlap,
        )
        return engine, cache

    def _runner(self, share: Share | None) -> tuple[ModelRunner, SequencePools]:
        if share is None:
            return self._ours.runner, self._ours.cache.pools
        pools = self._pools(share, "cpu")
        _, kernels = pick_device(WorkerSection(device="cpu"))
        dtype = self._ours.cache.pools.states.dtype
        model = load_model(self.setup.model_dir, dtype=dtype, kernels=kernels)
        return ModelRunner(model, pools), pools

    def _pools(self, share: Share | None, device: str) -> SequencePools:
        pools = self._ours.cache.pools
        return build_pools(
            pools.states.geometry,
            pools.kv.geometry,
            self.sizes(share),
            grid=pools.grid,
            dtype=pools.states.dtype,
            device=torch.device(device),
        )

    def _cache(
        self,
        policy: Policy,
        share: Share | None,
        pools: SequencePools,
        options: CacheOptions | None,
    ) -> StateCache:
        reuse = policy.adapt(self._ours.cache.reuse, BUDGET_TOKENS)
        if options is not None:
            reuse = replace(reuse, options=options)
        return policy.make(pools, self.sizes(share), reuse)


def hit_rate(counters: CacheCounters) -> float:
    """Tokens that needed no forward, of all prompt tokens."""
    hits = counters.boundary_hit_tokens + counters.tail_hit_tokens
    return hits / max(counters.prompt_tokens, 1)
