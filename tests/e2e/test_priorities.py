"""A cluster that is full of requests of low priority serves one of high priority at once, and
changes no bit of anybody's answer."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest

from e2e.conftest import GRID, new_cluster
from e2e.test_services import scrape
from stateferry.client import Client, Completion, Delta, GenerateOptions
from stateferry.core.request import GenerationRequest
from stateferry.core.sampling import SamplingParams, StopConditions
from stateferry.local import LocalCluster
from support.local_engine import local_engine
from support.pools import wait_until_idle
from support.tiny_hybrid import write_tiny_hybrid

SEATS = 2
LONG = 1500


@pytest.fixture(scope="module", params=["Mamba2", "FalconH1"])
def model_dir(
    request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    if request.param == "Mamba2":
        return tiny_model
    return write_tiny_hybrid(tmp_path_factory.mktemp("model") / "tiny", request.param)


@pytest.fixture(scope="module")
def small(model_dir: Path) -> Iterator[LocalCluster]:
    with new_cluster(model_dir, worker__max_requests=SEATS) as running:
        yield running
        assert running.deaths == ()


@dataclass
class Stream:
    """One request, as far as it has come."""

    name: str
    priority: int
    max_tokens: int
    temperature: float = 0.0
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    completion: Completion | None = None

    @property
    def prompt(self) -> tuple[int, ...]:
        return tuple(random.Random(self.name).choices(range(3, 259), k=2 * GRID + 5))

    async def run(self, client: Client) -> None:
        options = GenerateOptions(
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            seed=11,
            ignore_eos=True,
            logprobs=0,
            priority=self.priority,
            request_id=self.name,
            timeout_s=60,
        )
        async for event in client.generate(self.prompt, options):
            if isinstance(event, Delta):
                if event.token_ids:
                    assert event.index == len(self.ids), "a gap or a repetition in the stream"
                self.ids += event.token_ids
                self.logprobs += event.logprobs
            elif isinstance(event, Completion):
                self.completion = event

    async def has(self, tokens: int) -> None:
        async with asyncio.timeout(20):
            while len(self.ids) < tokens:
                await asyncio.sleep(0.001)

    def request(self) -> GenerationRequest:
        sampling = SamplingParams(self.temperature, 0, 1.0, 11, 0)
        stop = StopConditions(self.max_tokens, 0, frozenset())
        return GenerationRequest(self.name, self.prompt, sampling, stop)


def check_answers(model_dir: Path, *streams: Stream) -> None:
    engine, _ = local_engine(model_dir, grid=GRID)
    expected = engine.generate([stream.request() for stream in streams])
    for stream in streams:
        output = expected[stream.name]
        assert stream.ids == output.token_ids, stream.name
        assert stream.logprobs == [token.logprob for token in output.tokens], stream.name


def decode_count(cluster: LocalCluster, name: str) -> float:
    return scrape(cluster, "decode-0")[f"stateferry_worker_{name}_total", ()]


async def test_a_full_cluster_serves_the_higher_one_first(
    small: LocalCluster, model_dir: Path
) -> None:
    before = decode_count(small, "preemptions")
    low = [Stream(f"low-{n}", -1, LONG, temperature=0.8 * n) for n in range(SEATS)]
    behind, high = Stream("behind", -1, 3), Stream("high", 5, 40)
    async with Client(small.router_address) as client:
        running = [asyncio.create_task(stream.run(client)) for stream in low]
        await asyncio.gather(*(stream.has(20) for stream in low))
        running.append(asyncio.create_task(behind.run(client)))
        await asyncio.sleep(0.1)
        running.append(asyncio.create_task(high.run(client)))
        await high.has(1)
        assert not any(stream.completion for stream in low), "a place came free by itself"
        assert not behind.ids, "of the same priority as those that run: it waits"
        await asyncio.gather(*running)
        await wait_until_idle(client, within_s=3)
    # The one that was pushed aside was not the first to end.
    assert decode_count(small, "preemptions") > before
    check_answers(model_dir, *low, behind, high)


async def test_many_of_all_priorities_at_once(small: LocalCluster, model_dir: Path) -> None:
    before = decode_count(small, "preemptions")
    rng = random.Random(5)
    streams = [
        Stream(f"s-{n}", rng.randrange(-2, 3), rng.randrange(2, 250), rng.choice([0.0, 0.9]))
        for n in range(24)
    ]
    async with Client(small.router_address) as client:

        async def later(stream: Stream) -> None:
            await asyncio.sleep(rng.random() * 0.6)
            await stream.run(client)

        await asyncio.gather(*map(later, streams))
        await wait_until_idle(client, within_s=3)
    assert decode_count(small, "preemptions") > before
    check_answers(model_dir, *streams)


async def test_a_client_that_leaves_while_its_stream_is_paused(small: LocalCluster) -> None:
    low = [Stream(f"leaves-{n}", 0, 20_000) for n in range(SEATS)]
    high = [Stream(f"stays-{n}", 1, 400) for n in range(SEATS)]
    before = decode_count(small, "preemptions")
    async with Client(small.router_address) as client:
        running = [asyncio.create_task(stream.run(client)) for stream in low]
        await asyncio.gather(*(stream.has(5) for stream in low))
        above = [asyncio.create_task(stream.run(client)) for stream in high]
        await asyncio.gather(*(stream.has(1) for stream in high))
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await asyncio.gather(*above)
        await wait_until_idle(client, within_s=3)
    assert decode_count(small, "preemptions") >= before + SEATS


async def test_priorities_outside_the_range_are_refused_by_name(small: LocalCluster) -> None:
    async with Client(small.router_address) as client:
        for priority in (-101, 101):
            with pytest.raises(grpc.aio.AioRpcError, match=r"priority: is not in \[-100, 100\]"):
                await Stream("refused", priority, 2).run(client)


async def test_nobody_is_pushed_aside_where_that_is_switched_off(tiny_model: Path) -> None:
    with new_cluster(tiny_model, worker__max_requests=1, worker__preempt=False) as cluster:
        low, high, next_low = Stream("low", 0, 800), Stream("high", 1, 5), Stream("next", 0, 5)
        async with Client(cluster.router_address) as client:
            running = [asyncio.create_task(low.run(client))]
            await low.has(5)
            running.append(asyncio.create_task(next_low.run(client)))
            await asyncio.sleep(0.05)
            running.append(asyncio.create_task(high.run(client)))
            await high.has(1)
            assert not next_low.ids, "it came first, and is not the next one"
            await asyncio.gather(*running)
        assert decode_count(cluster, "preemptions") == 0
