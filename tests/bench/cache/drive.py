"""Plays a workload against a real engine, or against the bookkeeping of a cache alone."""

from __future__ import annotations

import hashlib
import random
import statistics
import time
from collections import deque
from dataclasses import dataclass

from bench.cache.contenders import hit_rate
from bench.cache.workload import Desk, Talk, Turn, Workload
from stateferry.cache.state_cache import StateCache
from stateferry.colocated.engine import ColocatedEngine
from stateferry.core.request import GenerationRequest
from stateferry.core.sampling import SamplingParams, StopConditions

_GREEDY = SamplingParams(temperature=0.0, top_k=0, top_p=1.0, seed=0, logprobs=None)


@dataclass
class Played:
    """``ttft_s`` by request, in the order of their answers. ``digest`` is of all prompts and
    answers: equal for all who computed the same."""

    hit_rate: float
    ttft_s: list[float]
    wall_s: float
    num_output: int
    digest: str

    @property
    def ttft_p50_s(self) -> float:
        return statistics.median(self.ttft_s)


@dataclass
class _Asked:
    talk: Talk
    since_s: float
    first_s: float | None = None


def request_of(name: str, prompt: tuple[int, ...], turn: Turn) -> GenerationRequest:
    """It says as much as the workload wants, whatever the model would say."""
    return GenerationRequest(name, prompt, _GREEDY, StopConditions(turn.num_output, 0, frozenset()))


def play(engine: ColocatedEngine, cache: StateCache, workload: Workload, at_a_time: int) -> Played:
    """At most ``at_a_time`` requests in the engine; whoever has an answer makes room for the next
    turn in order."""
    desk, asked = Desk(workload), dict[str, _Asked]()
    ttft_s: list[float] = []
    answers: dict[str, bytes] = {}
    num_output = number = 0
    started = time.perf_counter()
    while desk or asked:
        while len(asked) < at_a_time and (talk := desk.next()) is not None:
            turn, prompt = talk.ask()
            request = request_of(f"{number}", prompt, turn)
            number += 1
            asked[request.request_id] = _Asked(talk, time.perf_counter())
            engine.submit(request)
        engine.step()
        now = time.perf_counter()
        for name, one in tuple(asked.items()):
            output = engine.outputs[name]
            if one.first_s is None and output.tokens:
                one.first_s = now - one.since_s
                ttft_s.append(one.first_s)
            if output.finish_reason is not None:
                ids = tuple(engine.outputs.pop(name).token_ids)
                num_output += len(ids)
                # Others may answer in another order.
                asking = repr((one.talk.history, ids)).encode()
                answers[name] = hashlib.sha256(asking).digest()
                del asked[name]
                one.talk.answer(ids)
    digest = hashlib.sha256(b"".join(sorted(answers.values()))).hexdigest()
    wall_s = time.perf_counter() - started
    return Played(hit_rate(cache.prefixes.counters), ttft_s, wall_s, num_output, digest)


def play_dry(cache: StateCache, workload: Workload, at_a_time: int, seed: int = 0) -> float:
    """The hit rate alone: leases are moved as a runner would, answers are drawn. Raises ValueError
    for a request that does not fit into an idle cache."""
    rng, desk = random.Random(seed), Desk(workload)
    running: deque[tuple[str, Talk, Turn]] = deque()
    number = 0
    while desk or running:
        talk = desk.next() if len(running) < at_a_time else None
        if talk is None:
            _end(cache, *running.popleft(), rng)
            continue
        turn, prompt = talk.ask()
        request = request_of(f"{number}", prompt, turn)
        number += 1
        while cache.resume(request, request.total_tokens) is None:
            if not running:
                raise ValueError(f"a request of {request.total_tokens} tokens does not fit")
            _end(cache, *running.popleft(), rng)
        cache.take_copies()
        lease = cache.lease(request.request_id)
        if lease.position < len(prompt):
            lease.advance(len(prompt) - lease.position, cache.pools.grid)
            lease.final = True
        cache.publish(request.request_id)
        running.append((request.request_id, talk, turn))
    return hit_rate(cache.prefixes.counters)


def _end(cache: StateCache, name: str, talk: Talk, turn: Turn, rng: random.Random) -> None:
    answer = tuple(rng.randrange(3, 1 << 20) for _ in range(turn.num_output))
    lease = cache.lease(name)
    # The last token of an answer is not consumed.
    for token in answer[:-1]:
        lease.advance(1, cache.pools.grid)
        cache.consumed(name, token)
    cache.take_copies()
    cache.release(name)
    talk.answer(answer)
