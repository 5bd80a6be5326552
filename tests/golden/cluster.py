"""The same through a router, a prefill worker with its cache, a hand-off and a decode worker."""

from __future__ import annotations

import asyncio
import struct
from pathlib import Path

from e2e.asking import ask
from golden.cases import Oracle, Prompts, lengths_of
from golden.compare import Engine, PathNotTaken, Tally
from stateferry.client import Client
from stateferry.config import load_config
from stateferry.local.cluster import LocalCluster

AT_A_TIME = 8


async def through_a_cluster(
    model_dir: Path, dtype: str, grid: int, seed: int, tally: Tally
) -> None:
    """Fresh prompts, repeated ones, and ones that begin alike, eight at a time."""
    first = Engine(model_dir, dtype, grid, cached=False)
    oracle, prompts = Oracle(first), Prompts(first.vocab_size, seed)
    fresh = [prompts.ids(length) for length in lengths_of(grid)]
    stems = [ids[: prompts.rng.randrange(1, len(ids) + 1)] for ids in fresh for _ in range(2)]
    waves = [
        ("prefill and decode apart", fresh),
        ("apart, prompt repeated", fresh),
        ("apart, prefix resumed", [(*ids, *prompts.ids(7)) for ids in stems]),
    ]
    config = load_config(
        overrides={
            "model.dir": str(model_dir),
            "model.dtype": dtype,
            "model.grid_tokens": grid,
            "model.max_context_tokens": 1024,
            "cache.memory_bytes": 64 << 20,
            "router.port": 0,
            "log.level": "warning",
        }
    )
    async with LocalCluster(config) as cluster, Client(cluster.router_address) as client:
        gate = asyncio.Semaphore(AT_A_TIME)
        for path, wave in waves:

            async def one(number: int, ids: tuple[int, ...], path: str = path) -> int:
                request = prompts.ask(ids)
                async with gate:
                    token_ids, logprobs, completion = await ask(client, request)
                found = tuple(
                    (token, struct.pack("<f", logprob))
                    for token, logprob in zip(token_ids, logprobs, strict=True)
                )
                tally.compare(path, f"{len(ids)} tokens, number {number}", found, oracle(request))
                return int(completion.resumed_tokens)

            resumed = await asyncio.gather(*(one(n, ids) for n, ids in enumerate(wave)))
            if path != waves[0][0] and not any(resumed):
                raise PathNotTaken(f"{path}: nothing was resumed")
