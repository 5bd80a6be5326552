"""The next turn of a chat, while prefill workers have no place for anybody."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from e2e.asking import ask
from e2e.conftest import GRID, new_cluster
from stateferry.client import Client, Completion
from stateferry.core.request import GenerationRequest
from stateferry.core.sampling import SamplingParams, StopConditions
from stateferry.local import LocalCluster
from support.local_engine import local_engine
from support.pools import wait_until_idle

LONG = 24_000


@pytest.fixture(scope="module")
def single(tiny_model: Path) -> Iterator[LocalCluster]:
    """One place per worker."""
    with new_cluster(tiny_model, worker__max_requests=1) as running:
        yield running
        assert running.deaths == ()


def request(name: str, ids: tuple[int, ...], max_tokens: int = 9) -> GenerationRequest:
    stop = StopConditions(max_tokens, 0, frozenset())
    return GenerationRequest(name, ids, SamplingParams(0.0, 0, 1.0, 1, 0), stop)


def words(seed: int, length: int) -> tuple[int, ...]:
    return tuple(random.Random(seed).choices(range(3, 259), k=length))


async def busy(client: Client, seed: int) -> asyncio.Task[object]:
    """A long prompt at the prefill worker, for one token: no decode worker is needed."""
    long = asyncio.ensure_future(ask(client, request(f"long-{seed}", words(seed, LONG), 1)))
    async with asyncio.timeout(10):
        while not any(w.dispatched_requests for w in await client.list_workers()):
            await asyncio.sleep(0.01)
    return long


async def check(
    client: Client, model_dir: Path, wanted: GenerationRequest
) -> tuple[list[int], Completion]:
    ids, logprobs, completion = await ask(client, wanted)
    engine, _ = local_engine(model_dir, grid=GRID)
    [output] = (await asyncio.to_thread(engine.generate, [wanted])).values()
    assert ids == output.token_ids
    assert logprobs == [token.logprob for token in output.tokens]
    return ids, completion


async def test_a_turn_that_decode_knows_does_not_wait_for_prefill(
    single: LocalCluster, tiny_model: Path
) -> None:
    async with Client(single.router_address) as client:
        prompt = words(1, 3 * GRID)
        answer, _ = await check(client, tiny_model, request("first", prompt))
        await wait_until_idle(client, within_s=3)
        long = await busy(client, 2)
        history = (*prompt, *answer, 5)
        ids, _, completion = await ask(client, request("second", history))
        assert not long.done(), "the prefill worker had a place by then"
        assert completion.prefill_worker == completion.decode_worker
        assert completion.resumed_tokens == len(history) - 2
        await long
        await wait_until_idle(client, within_s=3)
        assert ids == (await check(client, tiny_model, request("again", history)))[0]


async def test_one_that_only_looked_like_it_waits_and_loses_nothing(
    single: LocalCluster, tiny_model: Path
) -> None:
    """Its beginning is that of the last turn, what follows is long and new."""
    async with Client(single.router_address) as client:
        prompt = words(3, 3 * GRID)
        answer, _ = await check(client, tiny_model, request("first", prompt))
        await wait_until_idle(client, within_s=3)
        long = await busy(client, 4)
        history = (*prompt, *answer, *words(5, 400))
        _, completion = await check(client, tiny_model, request("second", history))
        assert long.done() and completion.prefill_worker.startswith("prefill-")
        await long
        await wait_until_idle(client, within_s=3)
