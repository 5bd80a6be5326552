"""Which workers there are, and how busy: a pure registry with an injected clock.

::

    join ----> [ live ] --stream ended--> LEFT   no new work; calls in flight may finish
                  |
                  +------silence, or a newer incarnation--> LOST   nothing more will come

A worker counts as busy from the moment of dispatch; its own reports add what others sent it.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from stateferry.core.clock import Clock
from stateferry.core.errors import HandshakeMismatch, Overloaded, Refused
from stateferry.core.fingerprint import PROTOCOL_VERSION
from stateferry.core.ids import Role, WorkerKey
from stateferry.core.request import MAX_PRIORITY, MIN_PRIORITY
from stateferry.core.worker import WorkerDescription, WorkerLoad

SILENT_INTERVALS = 3
# Ids whose newest incarnation is remembered; those of live workers are never forgotten.
MAX_KNOWN_IDS = 4096
MAX_WORKERS = 1024


@dataclass(slots=True)
class Share:
    """What dispatches of one priority have of a worker."""

    requests: int = 0
    kv_pages: int = 0


class ChangeKind(enum.Enum):
    """What happened to a worker. REPORTED and RELEASED may have made room for a request."""

    JOINED = "joined"
    REPORTED = "reported"
    RELEASED = "released"
    LEFT = "left"
    LOST = "lost"


@dataclass(frozen=True, slots=True)
class Change:
    """One thing that happened to one life of a worker."""

    kind: ChangeKind
    worker: WorkerDescription
    reason: str


@dataclass(frozen=True, slots=True)
class Registration:
    """One join of one life of a worker; a later join makes it stale."""

    key: WorkerKey
    number: int


@dataclass(frozen=True, slots=True)
class WorkerView:
    """A worker as placement and status pages see it.

    ``busy_*`` is this router's dispatches plus what the worker's report holds beyond them;
    ``shares`` are of the dispatches, by priority.
    """

    description: WorkerDescription
    load: WorkerLoad | None
    dispatched_requests: int
    busy_requests: int
    busy_tokens: int
    busy_kv_pages: int
    silence_s: float
    shares: Mapping[int, Share] = field(default_factory=dict)

    def has_room(self, held_tokens: int, priority: int = MIN_PRIORITY) -> bool:
        """Whether a sequence of so many tokens could be admitted now; of a ``priority`` that may
        push lower ones aside, beside the others alone."""
        pools, lower = self.description.pools, self.below(priority)
        kv_pages = self.busy_kv_pages - lower.kv_pages
        return (
            self.busy_requests - lower.requests < self.description.capacity_requests
            and kv_pages + pools.kv_pages_for(held_tokens) <= pools.kv_pages
        )

    def below(self, priority: int) -> Share:
        """What a request of this priority may push aside; nothing where nobody is preempted."""
        lower = Share()
        if self.description.preempts:
            for level, share in self.shares.items():
                if level < priority:
                    lower.requests += share.requests
                    lower.kv_pages += share.kv_pages
        return lower


@dataclass(slots=True)
class _Member:
    description: WorkerDescription
    registration: Registration
    last_heard_s: float
    load: WorkerLoad | None = None
    dispatched_requests: int = 0
    dispatched_tokens: int = 0
    dispatched_kv_pages: int = 0
    shares: dict[int, Share] = field(default_factory=dict)
    # Work that the last report showed beyond what this router had sent by then.
    other_requests: int = 0
    other_tokens: int = 0
    other_kv_pages: int = 0

    def view(self, now_s: float) -> WorkerView:
        return WorkerView(
            description=self.description,
            load=self.load,
            dispatched_requests=self.dispatched_requests,
            busy_requests=self.dispatched_requests + self.other_requests,
            busy_tokens=self.dispatched_tokens + self.other_tokens,
            busy_kv_pages=self.dispatched_kv_pages + self.other_kv_pages,
            silence_s=now_s - self.last_heard_s,
            shares=self.shares,
        )


class Dispatch:
    """One request counted on one worker until ``release``, which may be called again."""

    def __init__(
        self,
        registry: WorkerRegistry,
        worker: WorkerDescription,
        tokens: int,
        kv_pages: int,
        priority: int,
    ) -> None:
        self.worker = worker
        self.priority = priority
        self._registry = registry
        self._tokens = tokens
        self._kv_pages = kv_pages
        self._held = True

    def release(self) -> None:
        if self._held:
            self._held = False
            self._registry.end_dispatch(self.worker, self._tokens, self._kv_pages, self.priority)


class WorkerRegistry:
    """All live workers by id. Changes are told to subscribers, synchronously and in order."""

    def __init__(self, clock: Clock, heartbeat_interval_s: float) -> None:
        self._clock = clock
        self._silence_limit_s = SILENT_INTERVALS * heartbeat_interval_s
        self._members: dict[str, _Member] = {}
        self._newest: dict[str, int] = {}
        self._num_joins = 0
        self._subscribers: list[Callable[[Change], None]] = []

    def subscribe(self, subscriber: Callable[[Change], None]) -> None:
        self._subscribers.append(subscriber)

    def join(self, description: WorkerDescription) -> Registration:
        """Add a worker. Raises HandshakeMismatch for an old incarnation or another protocol."""
        key, protocol = description.key, description.fingerprint.protocol
        if protocol != PROTOCOL_VERSION:
            raise HandshakeMismatch("protocol", PROTOCOL_VERSION, protocol)
        newest = self._newest.get(key.worker_id, 0)
        if key.incarnation < newest:
            raise HandshakeMismatch("incarnation", newest, key.incarnation)
        before = self._members.get(key.worker_id)
        if before is None and len(self._members) >= MAX_WORKERS:
            raise Overloaded(f"{MAX_WORKERS} workers have joined already")
        if before is not None and before.description.key != key:
            self._lose(before, f"replaced by {key}")
        self._remember(key)
        self._num_joins += 1
        registration = Registration(key, self._num_joins)
        member = _Member(description, registration, self._clock.monotonic_s())
        if before is not None and before.description.key == key:
            # The same life on a new stream still holds what it was sent.
            member.dispatched_requests = before.dispatched_requests
            member.dispatched_tokens = before.dispatched_tokens
            member.dispatched_kv_pages = before.dispatched_kv_pages
            member.shares = before.shares
        self._members[key.worker_id] = member
        self._tell(ChangeKind.JOINED, description, "joined")
        return registration

    def report(self, registration: Registration, load: WorkerLoad) -> None:
        """Take in a heartbeat. Raises Refused when the registration has lapsed."""
        member = self._member_of(registration)
        if member is None:
            raise Refused(f"{registration.key} is not registered any more; join again")
        member.last_heard_s = self._clock.monotonic_s()
        if member.load is not None and load.sequence <= member.load.sequence:
            return
        member.load = load
        member.other_requests = max(0, load.active_requests - member.dispatched_requests)
        member.other_tokens = max(0, load.queued_tokens - member.dispatched_tokens)
        held_kv_pages = load.kv_pages.total - load.kv_pages.free
        member.other_kv_pages = max(0, held_kv_pages - member.dispatched_kv_pages)
        self._tell(ChangeKind.REPORTED, member.description, "reported")

    def leave(self, registration: Registration) -> None:
        """The worker's stream ended. A stale registration changes nothing."""
        member = self._member_of(registration)
        if member is not None:
            del self._members[registration.key.worker_id]
            self._tell(ChangeKind.LEFT, member.description, "its membership stream ended")

    def sweep(self) -> None:
        """Remove the workers that have been silent for too long."""
        now_s = self._clock.monotonic_s()
        for member in list(self._members.values()):
            silence_s = now_s - member.last_heard_s
            if silence_s > self._silence_limit_s:
                self._lose(member, f"silent for {silence_s:.1f} s")

    def forgive(self, seconds: float) -> None:
        """This process itself stood still for so long: what it did not hear, it could not hear."""
        now_s = self._clock.monotonic_s()
        for member in self._members.values():
            member.last_heard_s = min(now_s, member.last_heard_s + seconds)

    def dispatch(
        self,
        worker: WorkerDescription,
        tokens: int,
        held_tokens: int,
        priority: int = MAX_PRIORITY,
    ) -> Dispatch:
        """Count a request on a live worker, from now on: ``tokens`` of its prompt, and the memory
        of ``held_tokens``, from which it may be pushed by those above ``priority``."""
        member = self._members[worker.key.worker_id]
        assert member.description.key == worker.key
        member.dispatched_requests += 1
        member.dispatched_tokens += tokens
        kv_pages = worker.pools.kv_pages_for(held_tokens)
        member.dispatched_kv_pages += kv_pages
        share = member.shares.setdefault(priority, Share())
        share.requests += 1
        share.kv_pages += kv_pages
        return Dispatch(self, worker, tokens, kv_pages, priority)

    def end_dispatch(
        self, worker: WorkerDescription, tokens: int, kv_pages: int, priority: int
    ) -> None:
        """For Dispatch.release only."""
        member = self._members.get(worker.key.worker_id)
        if member is None or member.description.key != worker.key:
            return
        # A life that left and came back in the meantime began to count at zero.
        member.dispatched_requests = max(0, member.dispatched_requests - 1)
        member.dispatched_tokens = max(0, member.dispatched_tokens - tokens)
        member.dispatched_kv_pages = max(0, member.dispatched_kv_pages - kv_pages)
        share = member.shares.get(priority, Share())
        share.requests = max(0, share.requests - 1)
        share.kv_pages = max(0, share.kv_pages - kv_pages)
        if not share.requests:
            member.shares.pop(priority, None)
        self._tell(ChangeKind.RELEASED, worker, "a request ended")

    def views(self, role: Role) -> list[WorkerView]:
        """Live workers of a role, by id."""
        now_s = self._clock.monotonic_s()
        return [
            member.view(now_s)
            for _, member in sorted(self._members.items())
            if member.description.role is role
        ]

    def is_live(self, key: WorkerKey) -> bool:
        member = self._members.get(key.worker_id)
        return member is not None and member.description.key == key

    def _remember(self, key: WorkerKey) -> None:
        self._newest.pop(key.worker_id, None)
        self._newest[key.worker_id] = key.incarnation
        if len(self._newest) > MAX_KNOWN_IDS:
            oldest = next(i for i in self._newest if i not in self._members)
            del self._newest[oldest]

    def _member_of(self, registration: Registration) -> _Member | None:
        member = self._members.get(registration.key.worker_id)
        return member if member is not None and member.registration == registration else None

    def _lose(self, member: _Member, reason: str) -> None:
        del self._members[member.description.key.worker_id]
        self._tell(ChangeKind.LOST, member.description, reason)

    def _tell(self, kind: ChangeKind, worker: WorkerDescription, reason: str) -> None:
        change = Change(kind, worker, reason)
        for subscriber in self._subscribers:
            subscriber(change)
