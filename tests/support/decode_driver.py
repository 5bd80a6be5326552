"""A decode worker without gRPC or an event loop: steps when it is told to, one after the other."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace
from typing import Literal

from stateferry.core.request import GenerationRequest
from stateferry.core.sampling import SampledToken
from stateferry.engine.forward_batch import ExtendBatch, ExtendRow
from stateferry.engine.launch import Running
from stateferry.engine.verify_batch import Run
from stateferry.scheduler.decode import DecodeScheduler
from stateferry.scheduler.decode_step import DecodeStep
from stateferry.scheduler.extend import ExtendStep
from stateferry.scheduler.standing import Preemption
from stateferry.worker.launcher import Launcher, one_each, sample_spec
from stateferry.worker.parts import EngineParts
from stateferry.worker.steering import steered

Step = DecodeStep | ExtendStep


@dataclass
class DecodeDriver:
    """Keeps ``max_in_flight`` steps started that have not landed. ``extended`` has the tokens of
    each extend of a preempted sequence, ``preempted_at`` how many tokens each had by then."""

    parts: EngineParts
    max_in_flight: Literal[1, 2] = 1
    starvation_s: float = 1e9
    budget_tokens: int = 64
    now_s: float = 0.0
    tokens: dict[str, list[SampledToken]] = field(default_factory=dict)
    extended: list[int] = field(default_factory=list)
    running: dict[str, GenerationRequest] = field(default_factory=dict)
    ended: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        grid = self.parts.grid
        self.scheduler = DecodeScheduler(
            self.parts.cache,
            max_waiting=99,
            max_in_flight=self.max_in_flight,
            starvation_s=self.starvation_s,
            preemption=Preemption(grid, max(grid, self.budget_tokens)),
        )
        self.launcher = Launcher(self.parts.runner, self.parts.cache, self.parts.speculator)
        self._in_flight: deque[tuple[Step, Running[list[Run]]]] = deque()
        self._arriving: dict[str, GenerationRequest] = {}

    def ask(self, request: GenerationRequest) -> None:
        """A request arrives; its prompt is computed as soon as it has memory."""
        request = steered(request, self.parts.rules)
        self._arriving[request.request_id] = request
        self.scheduler.admit(request.request_id, request.total_tokens, request.priority, self.now_s)
        self.grant()

    def grant(self) -> None:
        for request_id in self.scheduler.reserve_waiting(self.now_s):
            self._begin(self._arriving.pop(request_id))

    def step(self) -> bool:
        """Start what can be, and land the oldest; False when there was nothing."""
        while (step := self.scheduler.schedule()) is not None:
            if isinstance(step, ExtendStep):
                again = {p.request_id: self.scheduler.preempted(p.request_id) for p in step.slices}
                launch = self.launcher.extend(step, again).then(one_each)
                self.extended.append(step.num_tokens)
            else:
                rows = {r.request_id: self.running[r.request_id].continuation for r in step.rows}
                launch = self.launcher.decode(step, rows)
            self._in_flight.append((step, launch.start()))
        if not self._in_flight:
            return False
        oldest, started = self._in_flight.popleft()
        self._land(oldest, started.sampled())
        self.grant()
        return True

    def finish(self, *names: str) -> None:
        """Step until these have ended, or all have if none is named."""
        while not (self.ended.issuperset(names) if names else self.is_idle):
            assert self.step(), "nothing to run, and not at the end"

    @property
    def is_idle(self) -> bool:
        return not (self._in_flight or self.scheduler.num_active or self.scheduler.num_waiting)

    def count(self, name: str) -> int:
        return len(self.tokens.get(name, ()))

    def _begin(self, request: GenerationRequest) -> None:
        name, cache = request.request_id, self.parts.cache
        lease = cache.lease(name)
        row = ExtendRow(lease, request.prompt_ids, sample_spec(request.continuation, 0))
        launch = self.parts.runner.extend(ExtendBatch((row,)))
        [token] = self.launcher.in_order(launch)()
        assert token is not None
        cache.adopt(name, replace(request, rules=None))
        self.running[name] = request
        self.tokens[name] = [token]
        self.launcher.begin(name, request.prompt_ids)
        self.scheduler.activate(name, token.token_id, request.stop, request)

    def _land(self, step: Step, runs: list[Run]) -> None:
        if isinstance(step, ExtendStep):
            last = [part.request_id for part in step.slices if part.is_last]
            found = {
                (name, self.count(name)): run.tokens[0]
                for name, run in zip(last, runs, strict=True)
            }
        else:
            self.launcher.landed(step, runs)
            found = {
                (row.request_id, row.index + offset): token
                for row, run in zip(step.rows, runs, strict=True)
                for offset, token in enumerate(run.tokens)
            }
        for advance in self.scheduler.complete(step, [run.token_ids for run in runs]):
            name = advance.request_id
            assert advance.index == self.count(name), "a token was lost, or came twice"
            self.tokens[name].append(found[name, advance.index])
            if advance.finish_reason is not None:
                self.ended.add(name)
                self.launcher.end(name)
