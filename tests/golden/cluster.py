"""The same through a router, prefill and decode workers with their caches, and hand-offs."""

from __future__ import annotations

import asyncio
import struct
from pathlib import Path

from e2e.asking import ask
from golden.cases import Oracle, Prompts, lengths_of
from golden.compare import Bits, Engine, PathNotTaken, Tally
from stateferry.client import Client, Completion
from stateferry.config import Config, load_config
from stateferry.core.request import GenerationRequest
from stateferry.local.cluster import LocalCluster

AT_A_TIME = 8
TURNS = 4


async def through_a_cluster(
    model_dir: Path, dtype: str, grid: int, seed: int, tally: Tally
) -> None:
    """Prompts that prefill workers run, then chats that go on where they were decoded."""
    first = Engine(model_dir, dtype, grid, cached=False)
    oracle = Oracle(first)

    def config(local_prefill_tokens: int) -> Config:
        return load_config(
            overrides={
                "model.dir": str(model_dir),
                "model.dtype": dtype,
                "model.grid_tokens": grid,
                "model.max_context_tokens": 1024,
                "worker.local_prefill_tokens": local_prefill_tokens,
                "cache.memory_bytes": 64 << 20,
                "worker.overlap": "on",
                "router.port": 0,
                "log.level": "warning",
            }
        )

    async with LocalCluster(config(0)) as cluster, Client(cluster.router_address) as client:
        await _waves(client, oracle, Prompts(first.vocab_size, seed), grid, tally)
    async with LocalCluster(config(256)) as cluster, Client(cluster.router_address) as client:
        starts = lengths_of(grid)
        chats = [Prompts(first.vocab_size, seed + number) for number in range(len(starts))]
        pairs = zip(chats, starts, strict=True)
        await asyncio.gather(*(_chat(client, oracle, *pair, tally) for pair in pairs))


async def _waves(client: Client, oracle: Oracle, prompts: Prompts, grid: int, tally: Tally) -> None:
    """Fresh prompts, repeated ones, and ones that begin alike, eight at a time."""
    fresh = [prompts.ids(length) for length in lengths_of(grid)]
    stems = [ids[: prompts.rng.randrange(1, len(ids) + 1)] for ids in fresh for _ in range(2)]
    gate = asyncio.Semaphore(AT_A_TIME)
    for path, wave in (
        ("prefill and decode apart", fresh),
        ("apart, prompt repeated", fresh),
        ("apart, prefix resumed", [(*ids, *prompts.ids(7)) for ids in stems]),
    ):

        async def one(number: int, ids: tuple[int, ...], path: str = path) -> int:
            request = prompts.ask(ids)
            async with gate:
                found, completion = await _through(client, request)
            if not completion.prefill_worker.startswith("prefill"):
                raise PathNotTaken(f"{path}: ran on {completion.prefill_worker}")
            tally.compare(path, f"{len(ids)} tokens, number {number}", found, oracle(request))
            return int(completion.resumed_tokens)

        resumed = await asyncio.gather(*(one(n, ids) for n, ids in enumerate(wave)))
        if path != "prefill and decode apart" and not any(resumed):
            raise PathNotTaken(f"{path}: nothing was resumed")


async def _chat(client: Client, oracle: Oracle, prompts: Prompts, start: int, tally: Tally) -> None:
    """Each turn but the first runs where the one before was decoded, from its last token on."""
    history, consumed = prompts.ids(start), 0
    for turn in range(TURNS):
        request = prompts.ask(history, tokens=23)
        found, completion = await _through(client, request)
        path = "next turn, where it was decoded" if turn else "prefill and decode apart"
        is_there = completion.prefill_worker.startswith("decode")
        if is_there != bool(turn) or completion.resumed_tokens != consumed:
            where = f"{completion.resumed_tokens} of {len(history)} on {completion.prefill_worker}"
            raise PathNotTaken(f"{path}: turn {turn} from {start}: resumed {where}")
        tally.compare(path, f"turn {turn} from {start}", found, oracle(request))
        consumed = len(history) + len(found) - 1
        history = (*history, *(token for token, _ in found), *prompts.ids(3 + turn))


async def _through(client: Client, request: GenerationRequest) -> tuple[Bits, Completion]:
    token_ids, logprobs, completion = await ask(client, request)
    pairs = zip(token_ids, logprobs, strict=True)
    return tuple((token, struct.pack("<f", logprob)) for token, logprob in pairs), completion
