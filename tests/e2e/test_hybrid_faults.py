"""Workers of a hybrid die or stand still in mid-stream: everybody is answered, and right, and every
slot and page comes back."""

from __future__ import annotations

import asyncio
import dataclasses
import signal
from pathlib import Path

import pytest

from e2e.asking import ask
from e2e.conftest import GRID, new_cluster
from stateferry.client import Client
from stateferry.core.request import GenerationRequest
from support.local_engine import local_engine
from support.pools import wait_until_idle
from support.random_requests import random_requests
from support.tiny_hybrid import write_tiny_hybrid

# Long enough for the router to give a silent worker up.
STILL_S = 4.0
# Long enough for more than one request to be sent to it.
GATHER_S = 0.4


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_hybrid(tmp_path_factory.mktemp("model") / "tiny")


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("decode-0", signal.SIGKILL),
        ("prefill-0", signal.SIGKILL),
        ("decode-0", signal.SIGSTOP),
        ("prefill-0", signal.SIGSTOP),
    ],
)
async def test_a_worker_fails_under_load(hybrid: Path, name: str, number: signal.Signals) -> None:
    requests = random_requests(60, seed=3, max_prompt=5 * GRID, max_tokens=(1, 2, 40, 90))
    engine, _ = local_engine(hybrid, grid=GRID)
    expected = await asyncio.to_thread(engine.generate, requests)
    attempts: list[int] = []

    async def check(client: Client, request: GenerationRequest, delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        ids, logprobs, completion = await ask(client, request)
        attempts.append(completion.attempts)
        output = expected[request.request_id]
        assert ids == output.token_ids
        assert logprobs == [token.logprob for token in output.tokens]

    with new_cluster(
        hybrid,
        prefill=2,
        decode=2,
        model__max_context_tokens=8 * GRID,
        worker__memory_bytes=2_500_000,
        # A busy machine must not look like a dead worker.
        router__heartbeat_interval_s=1.0,
    ) as cluster:
        async with Client(cluster.router_address) as client:
            async with asyncio.TaskGroup() as group:
                for place, request in enumerate(requests):
                    group.create_task(check(client, request, place / 50))
                await asyncio.sleep(0.4)
                # It stands still before it dies, so that requests are surely there when it does.
                cluster.kill(name, signal.SIGSTOP)
                await asyncio.sleep(STILL_S if number is signal.SIGSTOP else GATHER_S)
                cluster.kill(name, signal.SIGCONT if number is signal.SIGSTOP else number)
            assert 1 in attempts and max(attempts) > 1, "nobody was there when it died"
            await wait_until_idle(client, within_s=20)
            # And those that are there go on.
            again = [dataclasses.replace(r, request_id=f"{r.request_id}-again") for r in requests]
            expected |= {f"{key}-again": output for key, output in expected.items()}
            await asyncio.gather(*(check(client, request, 0.0) for request in again))
            await wait_until_idle(client, within_s=20)
        assert [death.name for death in cluster.deaths] == [name] * (number is signal.SIGKILL)
