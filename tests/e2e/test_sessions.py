"""Turns of one session go where the last one went, whatever became of their history, and find what
that left."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import grpc
import pytest

from e2e.conftest import GRID, new_cluster
from e2e.test_services import scrape
from stateferry.client import Client, Completion, Delta, GenerateOptions
from stateferry.local import LocalCluster
from support.pools import wait_until_idle
from support.tiny_hybrid import write_tiny_hybrid


@pytest.fixture(scope="module", params=["Mamba2", "FalconH1"])
def model_dir(
    request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    if request.param == "Mamba2":
        return tiny_model
    return write_tiny_hybrid(tmp_path_factory.mktemp("model") / "tiny", request.param)


@pytest.fixture(scope="module")
def wide(model_dir: Path) -> Iterator[LocalCluster]:
    """Of each role several, so that a turn has to find the right ones."""
    with new_cluster(model_dir, prefill=2, decode=2) as running:
        yield running
        assert running.deaths == ()


EVENTS = ("begun", "ended", "evicted")


def words(seed: int, length: int) -> tuple[int, ...]:
    return tuple(random.Random(seed).choices(range(3, 259), k=length))


async def turn(
    client: Client, prompt: Sequence[int], session: str = "", tenant: str = "", tokens: int = 9
) -> tuple[list[int], Completion]:
    options = GenerateOptions(
        max_tokens=tokens,
        temperature=0.0,
        ignore_eos=True,
        session_id=session,
        tenant=tenant,
        timeout_s=60,
    )
    ids: list[int] = []
    async for event in client.generate(prompt, options):
        if isinstance(event, Delta):
            ids += event.token_ids
        elif isinstance(event, Completion):
            return ids, event
    raise AssertionError("no completion")


def prefill_of(completion: Completion) -> str:
    return completion.prefill_worker.split("@")[0]


async def test_a_session_stays_where_it_is_though_its_history_is_edited(
    wide: LocalCluster,
) -> None:
    """No two turns have a beginning in common: the name is all that there is to go by."""
    async with Client(wide.router_address) as client:
        places = {}
        for number in range(8):
            _, first = await turn(client, words(number, 100), f"s{number}")
            places[number] = (first.prefill_worker, first.decode_worker)
        assert len(set(places.values())) == 2, "they were spread in the first place"
        for again in range(1, 4):
            # Whoever takes turns has another one than before.
            await turn(client, words(1000 + again, 40))
            for number, place in places.items():
                _, later = await turn(client, words(100 * again + number, 90), f"s{number}")
                assert (later.prefill_worker, later.decode_worker) == place


async def test_another_tenants_session_of_the_same_name_is_another(wide: LocalCluster) -> None:
    async with Client(wide.router_address) as client:
        seen = set()
        for number in range(6):
            _, done = await turn(client, words(number, 100), "same", tenant=f"tenant-{number}")
            seen.add((done.prefill_worker, done.decode_worker))
        assert len(seen) > 1


async def test_an_edited_history_resumes_at_the_prefill_worker_that_had_it(
    wide: LocalCluster,
) -> None:
    """The first turn's prompt is known there up to where it was edited, give or take an interval;
    what was decoded is another matter."""
    async with Client(wide.router_address) as client:
        prompt = words(70, 20 * GRID)
        _, first = await turn(client, prompt, "edited")
        edited = (*prompt[: 18 * GRID], *words(71, 3 * GRID))
        _, second = await turn(client, edited, "edited")
        assert second.prefill_worker == first.prefill_worker
        assert second.resumed_tokens >= 16 * GRID


async def test_the_last_turn_outlives_all_that_others_leave(model_dir: Path) -> None:
    """Two chats and a flood of other prompts; one of the two has a name."""
    memory = {"worker__max_requests": 2, "cache__memory_bytes": 1 << 19}
    with new_cluster(model_dir, model__max_context_tokens=1024, **memory) as cluster:
        async with Client(cluster.router_address) as client:
            history = {}
            for seed, session in ((80, "kept"), (81, "")):
                prompt = words(seed, 5 * GRID)
                answer, _ = await turn(client, prompt, session)
                history[session] = (*prompt, *answer, 7)
            for number in range(40):
                await turn(client, words(1000 + number, 3 * GRID + 7), tokens=5)
            _, lost = await turn(client, history[""])
            _, kept = await turn(client, history["kept"], "kept")
            await wait_until_idle(client, within_s=3)
        counts = scrape(cluster, "decode-0")
        assert cluster.deaths == ()
    assert counts["stateferry_cache_entries_total", ("evicted", "state")], "nothing had to go"
    assert kept.resumed_tokens == len(history["kept"]) - 2 > lost.resumed_tokens
    assert prefill_of(kept).startswith("decode-")
    events = {event: counts["stateferry_cache_protections_total", (event,)] for event in EVENTS}
    assert events["begun"] >= 2 and events["ended"] and not events["evicted"]


async def test_names_that_are_none_are_refused(wide: LocalCluster) -> None:
    async with Client(wide.router_address) as client:
        for name in ("a/b", "x" * 129, "white space"):
            with pytest.raises(grpc.aio.AioRpcError, match="session_id: is not 1 to 128 of"):
                await turn(client, (5,), name)
