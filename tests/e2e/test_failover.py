"""Workers are killed in mid-stream, and no client can tell: the same tokens, the same bytes of log-
probabilities, each once and in order."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from e2e.conftest import GRID, new_cluster
from stateferry.client import Client
from stateferry.local import LocalCluster
from support.client_streams import Stream, mixed_streams, run_all
from support.pools import wait_until_idle
from support.tiny_hybrid import write_tiny_hybrid

FREED_S = 3.0
LENGTHS = (1, 5, GRID, 70, 100)


def streams(count: int, seed: int) -> list[Stream]:
    return mixed_streams(count, seed, tokens=3 * GRID, lengths=LENGTHS)


@pytest.fixture(scope="module")
def tiny_hybrid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_hybrid(tmp_path_factory.mktemp("model") / "tiny", "NemotronH")


@pytest.fixture(params=["Mamba2", "NemotronH"])
def two_decodes(
    request: pytest.FixtureRequest, tiny_model: Path, tiny_hybrid: Path
) -> Iterator[LocalCluster]:
    model_dir = tiny_model if request.param == "Mamba2" else tiny_hybrid
    with new_cluster(model_dir, decode=2) as running:
        yield running


async def test_decode_killed(two_decodes: LocalCluster) -> None:
    """Undisturbed the first time; then it is killed at token 1, and back again at a chunk edge."""
    for at in (1, GRID):
        await _kill_decode(two_decodes, at)
        two_decodes.restart("decode-1")


async def _kill_decode(two_decodes: LocalCluster, at: int) -> None:
    async with Client(two_decodes.router_address) as client:
        expected = streams(10, seed=at)
        disturbed = [stream.again() for stream in expected]
        await run_all(client, expected)
        tasks = [asyncio.create_task(stream.run(client)) for stream in disturbed]
        await asyncio.gather(*(stream.has(at) for stream in disturbed))
        two_decodes.kill("decode-1", signal.SIGKILL)
        async with asyncio.timeout(60):
            await asyncio.gather(*tasks)
        assert [s.answer for s in disturbed] == [s.answer for s in expected]
        attempts = {s.attempts for s in disturbed}
        assert 1 in attempts and max(attempts) > 1, "it had no streams, or all of them"
        assert {s.attempts for s in expected} == {1}
        assert await wait_until_idle(client, FREED_S) <= FREED_S
        assert two_decodes.wait_dead("decode-1", 5)


async def test_prefill_killed(tiny_hybrid: Path) -> None:
    """With prompts on it that are half computed, and others in its queue."""
    with new_cluster(tiny_hybrid, prefill=2, decode=1) as cluster:
        async with Client(cluster.router_address) as client:
            disturbed = mixed_streams(8, 3, tokens=40, lengths=(900,))
            tasks = [asyncio.create_task(stream.run(client)) for stream in disturbed]
            await asyncio.sleep(0.05)
            cluster.kill("prefill-1", signal.SIGKILL)
            async with asyncio.timeout(60):
                await asyncio.gather(*tasks)
            assert max(s.attempts for s in disturbed) > 1, "it had nothing to do"
            expected = [stream.again() for stream in disturbed]
            await run_all(client, expected)
            assert [s.answer for s in disturbed] == [s.answer for s in expected]
            assert await wait_until_idle(client, FREED_S) <= FREED_S


async def test_the_only_decode_worker_comes_back(tiny_model: Path) -> None:
    """The request waits for its next life."""
    with new_cluster(tiny_model) as cluster:
        async with Client(cluster.router_address) as client:
            [expected] = streams(1, seed=5)
            disturbed = expected.again()
            await run_all(client, [expected])
            task = asyncio.create_task(disturbed.run(client))
            await disturbed.has(9)
            cluster.kill("decode-0", signal.SIGKILL)
            assert cluster.wait_dead("decode-0", 5)
            await asyncio.sleep(0.5)
            assert not task.done()
            # Here and in no other thread: a child dies with the thread that started it.
            cluster.restart("decode-0")
            async with asyncio.timeout(60):
                await task
            assert disturbed.answer == expected.answer and disturbed.attempts > 1
