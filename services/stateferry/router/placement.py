"""Chooses the workers of one request: a pure function of what is known about them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from stateferry.core.errors import InvalidRequest, NoWorker
from stateferry.core.fingerprint import Fingerprint
from stateferry.core.ids import Role, WorkerKey
from stateferry.core.request import MAX_PRIORITY, MIN_PRIORITY
from stateferry.core.worker import WorkerDescription
from stateferry.router.membership import WorkerView

# Compared in order: smaller is less loaded.
Load = tuple[float, int]
# How much busier a decode worker may be than the least loaded, as a share of its capacity, to be
# chosen for what it has cached: many prompts may begin alike.
_DETOUR_LOAD = 0.25


@dataclass(frozen=True, slots=True)
class Need:
    """What a request asks of its workers. ``total_tokens`` is prompt and max_tokens together;
    a request for one token only needs no decode worker. ``last_decode`` and ``last_prefill`` are
    wanted before others: they computed the conversation's last turn. A ``preemptible`` request can
    be paused where it is decoded. Workers that are ``avoided`` are as good as not there."""

    prompt_len: int
    total_tokens: int
    needs_decode: bool
    last_decode: WorkerKey | None = None
    last_prefill: WorkerKey | None = None
    priority: int = 0
    preemptible: bool = True
    # Whether to ask the last decode worker for it while no prefill worker has room.
    asks_decode: bool = False
    avoided: frozenset[WorkerKey] = frozenset()

    @property
    def pushed_by(self) -> int:
        """Priorities above this one may take its place on a decode worker."""
        return self.priority if self.preemptible else MAX_PRIORITY

    def held_tokens(self, role: Role) -> int:
        """The most tokens that a worker of this role has to hold."""
        return self.prompt_len if role is Role.PREFILL else self.total_tokens


@dataclass(frozen=True, slots=True)
class Placement:
    """``decode`` is None when nothing has to be handed off."""

    prefill: WorkerDescription
    decode: WorkerDescription | None


def place(
    prefills: Sequence[WorkerView], decodes: Sequence[WorkerView], need: Need, turn: int
) -> Placement | None:
    """The least-loaded pair with equal fingerprints and room, or None while there is none; with
    the workers of the conversation's last turn if those are not much busier.

    Where decode workers have no room left, one of lower priority makes way: a request counts those
    alone that it may not push aside. Prefill workers push nobody aside, and their places come free
    soon. ``turn`` grows with each placement: workers that are equally loaded take turns.
    """
    prefills, decodes = _without(prefills, need), _without(decodes, need)
    best_prefills = _best_by_fingerprint(prefills, need, turn, _prefill_load)
    for view in prefills:
        best = best_prefills.get(view.description.fingerprint)
        if best is not None and _is_worth_a_queue(view, best, need):
            best_prefills[view.description.fingerprint] = view
    if not need.needs_decode:
        alone = min(best_prefills.values(), key=_prefill_load, default=None)
        return None if alone is None else Placement(alone.description, None)
    pair = _pair(best_prefills, decodes, need, turn, MIN_PRIORITY)
    return pair or _pair(best_prefills, decodes, need, turn, need.priority)


def _pair(
    best_prefills: dict[Fingerprint, WorkerView],
    decodes: Sequence[WorkerView],
    need: Need,
    turn: int,
    priority: int,
) -> Placement | None:
    """With a decode worker that has room for those of ``priority``."""

    def load_of(view: WorkerView) -> Load:
        busy = view.busy_requests - view.below(priority).requests
        return busy / view.description.capacity_requests, busy

    best_decodes = _best_by_fingerprint(decodes, need, turn, load_of, priority)
    pairs = [(p, best_decodes[f]) for f, p in best_prefills.items() if f in best_decodes]
    pair = min(pairs, key=lambda p: (_prefill_load(p[0]), load_of(p[1])), default=None)
    if pair is None:
        return None
    prefill, decode = pair
    last = [v for v in decodes if v.description.key == need.last_decode]
    for fingerprint, view in _best_by_fingerprint(last, need, 0, load_of, priority).items():
        is_crowded = load_of(view)[0] > load_of(decode)[0] + _DETOUR_LOAD
        if fingerprint in best_prefills and not is_crowded:
            prefill, decode = best_prefills[fingerprint], view
    return Placement(prefill.description, decode.description)


def place_at_decode(
    prefills: Sequence[WorkerView], decodes: Sequence[WorkerView], need: Need, num_waiting: int
) -> Placement | None:
    """The decode worker of the conversation's last turn alone, which probably knows the prompt, if
    it has room for this one and for all ``num_waiting``; None if not. The prefill worker is only
    there to be named."""
    if not (need.asks_decode and need.needs_decode):
        return None
    held_tokens = (1 + num_waiting) * need.total_tokens
    for view in _without(decodes, need):
        worker = view.description
        places = worker.capacity_requests - view.busy_requests
        if worker.key == need.last_decode and places > num_waiting and view.has_room(held_tokens):
            like = [v for v in prefills if v.description.fingerprint == worker.fingerprint]
            named = min(like, key=_prefill_load, default=None)
            return None if named is None else Placement(named.description, worker)
    return None


def what_is_missing(
    prefills: Sequence[WorkerView], decodes: Sequence[WorkerView], need: Need
) -> NoWorker | InvalidRequest | None:
    """Why no wait will help with the workers there are, or None when one only has to be free."""
    prefills, decodes = _without(prefills, need), _without(decodes, need)
    if not prefills:
        return NoWorker("there is no prefill worker")
    if need.needs_decode and not decodes:
        return NoWorker("there is no decode worker")
    for views in (prefills, decodes) if need.needs_decode else (prefills,):
        longest = max(view.description.max_context_tokens for view in views)
        if need.total_tokens > longest:
            problem = (
                f"{need.total_tokens} with the prompt's {need.prompt_len}; "
                f"no {views[0].description.role.value} worker holds more than {longest} tokens"
            )
            return InvalidRequest("stop.max_tokens", problem)
    prefills = [v for v in prefills if _fits(v, need)]
    decodes = [v for v in decodes if _fits(v, need)]
    if need.needs_decode and _fingerprints(prefills).isdisjoint(_fingerprints(decodes)):
        return NoWorker("no prefill and decode workers have equal fingerprints")
    return None


def _best_by_fingerprint(
    views: Sequence[WorkerView],
    need: Need,
    turn: int,
    load: Callable[[WorkerView], Load],
    priority: int = MIN_PRIORITY,
) -> dict[Fingerprint, WorkerView]:
    """The least-loaded worker with room of each group that may pair among themselves."""
    best: dict[Fingerprint, WorkerView] = {}
    start = turn % len(views) if views else 0
    for view in (*views[start:], *views[:start]):
        held_tokens = need.held_tokens(view.description.role)
        if not view.has_room(held_tokens, priority) or not _fits(view, need):
            continue
        rival = best.get(view.description.fingerprint)
        if rival is None or load(view) < load(rival):
            best[view.description.fingerprint] = view
    return best


def _is_worth_a_queue(view: WorkerView, best: WorkerView, need: Need) -> bool:
    """Whether a prompt should go to the session's prefill worker. What is cached there saves the
    prompt at most, and after an edit perhaps half of it: no longer a queue is worth that."""
    return (
        view.description.key == need.last_prefill
        and view.has_room(need.prompt_len)
        and _fits(view, need)
        and view.busy_tokens <= best.busy_tokens + need.prompt_len // 2
    )


def _without(views: Sequence[WorkerView], need: Need) -> list[WorkerView]:
    return [view for view in views if view.description.key not in need.avoided]


def _prefill_load(view: WorkerView) -> Load:
    return view.busy_tokens, view.busy_requests


def _fits(view: WorkerView, need: Need) -> bool:
    return need.total_tokens <= view.description.max_context_tokens


def _fingerprints(views: Iterable[WorkerView]) -> set[Fingerprint]:
    return {view.description.fingerprint for view in views}
