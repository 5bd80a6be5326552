"""The next turn of a chat resumes where decode stopped, on the worker that did, and changes no
bit."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from e2e.asking import ask
from e2e.conftest import GRID, new_cluster
from e2e.test_services import scrape
from stateferry.client import Client, Completion, Delta, GenerateOptions
from stateferry.colocated.engine import Output
from stateferry.core.request import GenerationRequest
from stateferry.core.sampling import SamplingParams, StopConditions
from stateferry.local import LocalCluster
from support.local_engine import local_engine
from support.pools import wait_until_idle
from support.tiny_hybrid import write_tiny_hybrid

STARTS = (1, 5, GRID - 1, GRID, 2 * GRID + 7, 5 * GRID)
NEVER = frozenset[int]()


@pytest.fixture(scope="module", params=["Mamba2", "FalconH1"])
def model_dir(
    request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    if request.param == "Mamba2":
        return tiny_model
    return write_tiny_hybrid(tmp_path_factory.mktemp("model") / "tiny", request.param)


@pytest.fixture(scope="module")
def two(model_dir: Path) -> Iterator[LocalCluster]:
    """Two decode workers, so that a turn has to find the right one."""
    with new_cluster(model_dir, decode=2) as running:
        yield running
        assert running.deaths == ()


class Oracle:
    """Computes every prompt whole, one at a time."""

    def __init__(self, model_dir: Path) -> None:
        self._engine, _ = local_engine(model_dir, grid=GRID)
        self._lock = threading.Lock()

    def __call__(self, request: GenerationRequest) -> Output:
        with self._lock:
            return self._engine.generate([request])[request.request_id]


@pytest.fixture(scope="module")
def oracle(model_dir: Path) -> Oracle:
    return Oracle(model_dir)


class Chat:
    """One conversation. Each turn is checked against the oracle."""

    def __init__(self, client: Client, oracle: Oracle, seed: int, start: int) -> None:
        self._client = client
        self._oracle = oracle
        self._rng = random.Random(seed)
        self._name = f"chat-{seed}"
        self.history = self.say(start)
        self.turns = 0
        # Of the history, in any turn so far.
        self.consumed = 0

    def say(self, length: int) -> tuple[int, ...]:
        return tuple(self._rng.randrange(3, 259) for _ in range(length))

    async def turn(self, max_tokens: int, reply: int) -> Completion:
        self.turns += 1
        request = GenerationRequest(
            f"{self._name}-{self.turns}",
            self.history,
            SamplingParams(self._rng.choice([0.0, 0.9]), 0, 1.0, self._rng.getrandbits(64), 0),
            StopConditions(max_tokens, 0, NEVER),
        )
        ids, logprobs, completion = await ask(self._client, request)
        output = await asyncio.to_thread(self._oracle, request)
        assert ids == output.token_ids
        assert logprobs == [token.logprob for token in output.tokens]
        self.consumed = len(self.history) + len(ids) - 1
        self.history = (*self.history, *ids, *self.say(reply))
        return completion


def ran_at_decode(completion: Completion) -> bool:
    return completion.prefill_worker.startswith("decode-")


async def test_every_turn_resumes_at_the_last_token_of_the_one_before(
    two: LocalCluster, oracle: Oracle
) -> None:
    async with Client(two.router_address) as client:

        async def talk(start: int) -> None:
            chat = Chat(client, oracle, seed=start, start=start)
            first = await chat.turn(max_tokens=GRID + 9, reply=3)
            assert not ran_at_decode(first) and first.timings.transport == "ucx"
            # Past grid points and short of them.
            for max_tokens, reply in ((2, 1), (GRID, 4), (7, 20), (3 * GRID, 2), (2, 2)):
                consumed = chat.consumed
                turn = await chat.turn(max_tokens, reply)
                assert turn.resumed_tokens == turn.prefix_tokens == consumed
                assert turn.prefill_worker == turn.decode_worker == first.decode_worker
                assert (turn.timings.transport, turn.timings.handoff_bytes) == ("", 0)

        await asyncio.gather(*(talk(start) for start in STARTS))
        await wait_until_idle(client, within_s=3)
    counts = [scrape(two, f"decode-{number}") for number in range(2)]
    assert sum(c["stateferry_cache_lookups_total", ()] for c in counts) >= 5 * len(STARTS)
    steps = "stateferry_worker_step_seconds_count"
    assert sum(c[steps, ("extend",)] for c in counts) >= 5 * len(STARTS)


async def test_many_chats_at_once_with_hardly_any_memory(model_dir: Path, oracle: Oracle) -> None:
    """Nothing but what running sequences leave idle: what one turn left is often gone."""
    with new_cluster(model_dir, worker__max_requests=6, cache__memory_bytes=0) as cluster:
        async with Client(cluster.router_address) as client:
            gate = asyncio.Semaphore(3)

            async def talk(number: int) -> int:
                rng, here = random.Random(number), 0
                chat = Chat(client, oracle, seed=100 + number, start=rng.choice(STARTS))
                for _ in range(4):
                    async with gate:
                        completion = await chat.turn(rng.randrange(2, 40), rng.randrange(1, 30))
                    here += ran_at_decode(completion)
                return here

            ran_here = await asyncio.gather(*(talk(number) for number in range(9)))
            assert 0 < sum(ran_here) < 27, "some turns were found, and some were not"
            await wait_until_idle(client, within_s=3)
        assert cluster.deaths == ()


async def test_a_long_reply_is_for_a_prefill_worker(two: LocalCluster, oracle: Oracle) -> None:
    async with Client(two.router_address) as client:
        chat = Chat(client, oracle, seed=50, start=GRID)
        await chat.turn(max_tokens=4 * GRID, reply=3 * GRID)
        assert ran_at_decode(await chat.turn(max_tokens=9, reply=300))
        long = await chat.turn(max_tokens=9, reply=2)
        assert not ran_at_decode(long) and long.timings.transport == "ucx"
        # What decode had and what arrived are one from here on.
        assert ran_at_decode(await chat.turn(max_tokens=9, reply=2))


async def test_another_tenant_or_salt_finds_nothing(two: LocalCluster, oracle: Oracle) -> None:
    async with Client(two.router_address) as client:
        chat = Chat(client, oracle, seed=60, start=GRID)
        await chat.turn(max_tokens=GRID, reply=3)
        for who in ({"tenant": "other"}, {"cache_salt": "other"}):
            options = GenerateOptions(max_tokens=3, temperature=0.0, ignore_eos=True, **who)
            events = [e async for e in client.generate(chat.history, options)]
            completion = events[-1]
            assert isinstance(completion, Completion)
            assert completion.resumed_tokens == 0 and not ran_at_decode(completion)
        assert ran_at_decode(await chat.turn(max_tokens=3, reply=1))


async def test_a_turn_that_was_cut_off_leaves_only_what_is_right(
    two: LocalCluster, oracle: Oracle
) -> None:
    """The client leaves in mid-stream; then it goes on from what it has seen."""
    async with Client(two.router_address) as client:
        depths = []
        for seed in range(70, 76):
            chat = Chat(client, oracle, seed, start=GRID + seed % 9)
            options = GenerateOptions(max_tokens=5000, temperature=0.0, ignore_eos=True)
            seen: list[int] = []
            async with contextlib.aclosing(client.generate(chat.history, options)) as events:
                async for event in events:
                    if isinstance(event, Delta):
                        seen += event.token_ids
                    if len(seen) > 3 + seed % 40:
                        break
            await wait_until_idle(client, within_s=3)
            prompt_len = len(chat.history)
            chat.history = (*chat.history, *seen, *chat.say(2))
            completion = await chat.turn(max_tokens=20, reply=1)
            assert ran_at_decode(completion)
            depths.append(completion.resumed_tokens - prompt_len)
        # Of what was decoded at least some was kept.
        assert max(depths) > 0


async def test_both_workers_keep_a_chat_of_their_own(two: LocalCluster, oracle: Oracle) -> None:
    """Eight chats at a time stay where they are, on both workers."""
    async with Client(two.router_address) as client:
        chats = [Chat(client, oracle, seed=80 + n, start=GRID + n) for n in range(8)]
        firsts = [await chat.turn(max_tokens=9, reply=3) for chat in chats]
        assert len({first.decode_worker for first in firsts}) == 2
        for _ in range(2):
            for chat, first in zip(chats, firsts, strict=True):
                completion = await chat.turn(max_tokens=9, reply=3)
                assert completion.prefill_worker == first.decode_worker


async def test_penalties_and_a_guide_go_on_over_a_turn(two: LocalCluster) -> None:
    """Token 0 is chosen by decode here: its rules must hear of it once."""
    async with Client(two.router_address) as client:
        ids = tuple(range(3, 3 + 2 * GRID))
        plain = GenerateOptions(max_tokens=6, temperature=0.0, ignore_eos=True)
        answer = [e async for e in client.generate(ids, plain)]
        history = (*ids, *(i for e in answer if isinstance(e, Delta) for i in e.token_ids), 9)
        options = replace(
            plain, max_tokens=12, repetition_penalty=1.7, frequency_penalty=0.9, logprobs=0
        )
        streams = []
        for salt in ("", "nobody else's"):
            events = [e async for e in client.generate(history, replace(options, cache_salt=salt))]
            assert isinstance(events[-1], Completion)
            streams.append([(d.token_ids, d.logprobs) for d in events if isinstance(d, Delta)])
            assert ran_at_decode(events[-1]) == (not salt)
        assert streams[0] == streams[1]
        regex = replace(plain, ignore_eos=False, max_tokens=20, regex="(ab|cd){1,4}")
        texts = []
        for salt in ("", "nobody else's"):
            events = [e async for e in client.generate(history, replace(regex, cache_salt=salt))]
            assert isinstance(events[-1], Completion)
            texts.append("".join(e.text for e in events if isinstance(e, Delta)))
        assert texts[0] == texts[1] and texts[0]
