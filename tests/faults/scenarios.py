"""Things that happen to workers while they have streams, each with a real cluster."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc

from faults.outcome import Outcome
from stateferry.client import Client
from stateferry.config import load_config
from stateferry.local import LocalCluster
from support.client_streams import Stream, mixed_streams, run_all
from support.pools import wait_until_idle

TIMEOUT_S = 120.0
# To be free again, where a hand-off has to run dry first.
DRAINED_S = 5.0
# Reports reach the router twice a second.
_REPORTS_S = 1.0
_UNAVAILABLE_WITHIN_S = 1.0


@dataclass(frozen=True, slots=True)
class Setting:
    """``scale`` multiplies how often things are done."""

    model_dir: Path
    vocab: int
    grid: int
    seed: int
    streams: int
    tokens: int
    scale: float

    def times(self, full: int) -> int:
        return max(1, round(full * self.scale))

    def requests(self, offset: int = 0) -> list[Stream]:
        lengths = (1, 3, self.grid - 1, self.grid, self.grid + 1, 3 * self.grid + 5)
        return mixed_streams(
            self.streams,
            1000 * self.seed + offset,
            tokens=self.tokens,
            lengths=lengths,
            vocab=self.vocab,
        )


@contextlib.asynccontextmanager
async def cluster_of(
    setting: Setting, *, prefill: int = 1, decode: int = 1, **overrides: object
) -> AsyncIterator[tuple[LocalCluster, Client]]:
    """One decode worker has room for all."""
    config = load_config(
        overrides={
            "model.dir": str(setting.model_dir),
            "model.max_context_tokens": 2048,
            "router.port": 0,
            "worker.max_requests": setting.streams + 8,
            "worker.extend_budget_tokens": 256,
            "worker.overlap": "on",
            **{key.replace("__", "."): value for key, value in overrides.items()},
        },
        environ={},
    )
    async with (
        LocalCluster(config, prefill=prefill, decode=decode) as cluster,
        Client(cluster.router_address) as client,
    ):
        yield cluster, client


async def undisturbed(client: Client, streams: Sequence[Stream]) -> list[Stream]:
    expected = [stream.again() for stream in streams]
    await run_all(client, expected, TIMEOUT_S)
    return expected


async def _ended(tasks: Sequence[asyncio.Task[None]]) -> list[BaseException | None]:
    async with asyncio.timeout(TIMEOUT_S):
        return await asyncio.gather(*tasks, return_exceptions=True)


async def decode_killed(setting: Setting) -> Outcome:
    """kill -9 of one of two decode workers when its streams are at token 1, 8, a chunk's edge, and
    anywhere."""
    outcome, rng = Outcome("decode_killed"), random.Random(setting.seed)
    async with cluster_of(setting, decode=2) as (cluster, client):
        anywhere = rng.randrange(2, setting.tokens - 8)
        for offset, at in enumerate((1, 8, setting.grid, anywhere)):
            streams = setting.requests(offset)
            expected = await undisturbed(client, streams)
            victim = f"decode-{rng.randrange(2)}"
            tasks = [asyncio.create_task(stream.run(client)) for stream in streams]
            await asyncio.gather(*(stream.has(at) for stream in streams[::4]))
            cluster.kill(victim, signal.SIGKILL)
            outcome.add(streams, await _ended(tasks), expected)
            cluster.wait_dead(victim, 5)
            await _check_idle(outcome, client)
            await cluster.restart_beside(victim)
        outcome.demand(outcome.disturbed > 0, "no stream met the kill")
    return outcome


async def without_failover(setting: Setting) -> Outcome:
    """The same with one attempt each: all that were there end UNAVAILABLE, within a second."""
    outcome = Outcome("without_failover")
    async with cluster_of(setting, decode=2, router__max_attempts=1) as (cluster, client):
        streams = setting.requests()
        expected = await undisturbed(client, streams)
        tasks = [asyncio.create_task(stream.run(client)) for stream in streams]
        await asyncio.gather(*(stream.has(8) for stream in streams[::4]))
        cluster.kill("decode-1", signal.SIGKILL)
        began_s = time.monotonic()
        hurt: list[float] = []
        for task in tasks:
            task.add_done_callback(lambda _: hurt.append(time.monotonic() - began_s))
        errors = await _ended(tasks)
        failed = [e for e in errors if isinstance(e, grpc.aio.AioRpcError)]
        codes = {error.code() for error in failed}
        outcome.demand(bool(failed) and codes == {grpc.StatusCode.UNAVAILABLE}, f"ended {codes}")
        in_time = sorted(hurt)[: len(failed)]
        outcome.demand(max(in_time, default=0.0) < _UNAVAILABLE_WITHIN_S, "not within a second")
        # Those that were elsewhere are not to notice.
        kept = [n for n, error in enumerate(errors) if error is None]
        outcome.add([streams[n] for n in kept], [None] * len(kept), [expected[n] for n in kept])
    return outcome


async def prefill_killed(setting: Setting) -> Outcome:
    """kill -9 of one of two prefill workers, with prompts half computed and in its queue."""
    outcome = Outcome("prefill_killed")
    async with cluster_of(setting, prefill=2, cache__enabled=False) as (cluster, client):
        for offset in range(setting.times(3)):
            streams = [
                Stream((stream.prompt * 900)[:900], stream.options)
                for stream in setting.requests(20 + offset)[: setting.streams // 4]
            ]
            expected = await undisturbed(client, streams)
            tasks = [asyncio.create_task(stream.run(client)) for stream in streams]
            await asyncio.sleep(0.05 + 0.1 * offset)
            cluster.kill("prefill-0", signal.SIGKILL)
            outcome.add(streams, await _ended(tasks), expected)
            cluster.wait_dead("prefill-0", 5)
            await _check_idle(outcome, client)
            await cluster.restart_beside("prefill-0")
        outcome.demand(outcome.disturbed > 0, "no stream met the kill")
    return outcome


async def stopped(setting: Setting) -> Outcome:
    """SIGSTOP and SIGCONT of each role: for a moment, and for longer than anybody waits."""
    outcome = Outcome("stopped")
    async with cluster_of(setting, prefill=2, decode=2) as (cluster, client):
        cases = [(name, s) for name in ("decode-0", "prefill-0") for s in (0.3, 4.0)]
        for offset, (name, seconds) in enumerate([*cases, ("router", 0.3)]):
            streams = setting.requests(40 + offset)
            expected = await undisturbed(client, streams)
            tasks = [asyncio.create_task(stream.run(client)) for stream in streams]
            await asyncio.gather(*(stream.has(4) for stream in streams[::8]))
            cluster.kill(name, signal.SIGSTOP)
            outcome.demand(_is_stopped(cluster.pids[name]), f"{name} did not stop")
            await asyncio.sleep(seconds)
            cluster.kill(name, signal.SIGCONT)
            outcome.add(streams, await _ended(tasks), expected)
            await _check_idle(outcome, client)
        outcome.demand(outcome.disturbed > 0, "nobody gave a stopped worker up")
    return outcome


async def rolling_restart(setting: Setting) -> Outcome:
    """SIGTERM to one worker after the other, each of which comes back, with streams all the
    time."""
    outcome = Outcome("rolling_restart")
    async with cluster_of(setting, prefill=2, decode=2) as (cluster, client):
        streams = setting.requests(60)
        expected = await undisturbed(client, streams)
        done = asyncio.Event()
        waves: list[tuple[list[Stream], list[BaseException | None]]] = []

        async def load() -> None:
            while not done.is_set():
                wave = [stream.again() for stream in streams[: setting.streams // 4]]
                tasks = [asyncio.create_task(stream.run(client)) for stream in wave]
                waves.append((wave, await _ended(tasks)))

        loading = asyncio.create_task(load())
        for name in ("prefill-0", "prefill-1", "decode-0", "decode-1"):
            cluster.kill(name, signal.SIGTERM)
            while not cluster.wait_dead(name, 0):
                await asyncio.sleep(0.05)
            await cluster.restart_beside(name)
            await asyncio.sleep(0.5)
        done.set()
        await loading
        outcome.demand(len(waves) > 4, "there was no load while workers restarted")
        for wave, errors in waves:
            outcome.add(wave, errors, expected[: len(wave)])
        await _check_idle(outcome, client)
    return outcome


async def aborts(setting: Setting) -> Outcome:
    """Clients that go away in every phase."""
    outcome, rng = Outcome("aborts"), random.Random(setting.seed)
    count, at_once = setting.times(10_000), 32
    async with cluster_of(setting, prefill=1, decode=1) as (_, client):
        streams = setting.requests(80)
        expected = await undisturbed(client, streams)
        left = count

        async def cancel_some() -> None:
            nonlocal left
            while left > 0:
                left -= 1
                stream = rng.choice(streams).again()
                task = asyncio.create_task(stream.run(client))
                await asyncio.sleep(rng.choice((0.0, 0.002, 0.01, 0.05, 0.1)) * rng.random())
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, grpc.aio.AioRpcError):
                    await task

        await asyncio.gather(*(cancel_some() for _ in range(at_once)))
        await _check_idle(outcome, client)
        again = [stream.again() for stream in streams]
        errors = await _ended([asyncio.create_task(stream.run(client)) for stream in again])
        outcome.add(again, errors, expected)
    outcome.streams += count
    return outcome


def _is_stopped(pid: int) -> bool:
    """Once the signal has been delivered, which takes a moment."""
    deadline_s = time.monotonic() + 1.0
    while time.monotonic() < deadline_s:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2]
        if status.split()[0] == "T":
            return True
        time.sleep(0.002)
    return False


async def _check_idle(outcome: Outcome, client: Client) -> None:
    """What workers hold, which also check their own books, has come back."""
    try:
        await wait_until_idle(client, DRAINED_S + _REPORTS_S)
    except AssertionError as error:
        outcome.demand(False, str(error))


SCENARIOS: dict[str, Callable[[Setting], Coroutine[None, None, Outcome]]] = {
    scenario.__name__: scenario
    for scenario in (
        decode_killed,
        without_failover,
        prefill_killed,
        stopped,
        rolling_restart,
        aborts,
    )
}
