"""A free list of numbered places."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from stateferry.core.errors import InvariantViolation
from stateferry.core.worker import PoolCount

# Owners with a slash are not request ids, which have none.
CACHE_OWNER = "cached/"
_TRANSFER = "in transfer/"
_QUARANTINE = "quarantined/"


def in_transfer(request_id: str) -> str:
    """Who owns what is being sent or received for a request that runs here no more, or not yet."""
    return _TRANSFER + request_id


def quarantined(request_id: str) -> str:
    """Who owns what a late write of a request could still reach."""
    return _QUARANTINE + request_id


@dataclass(frozen=True, slots=True)
class Occupancy:
    """A pool's ids by kind of owner; they add up to the pool's total."""

    free: int
    running: int
    cached: int
    in_transfer: int
    quarantined: int


def _kind(owner: str) -> str:
    prefix, slash, _ = owner.partition("/")
    return prefix if slash else "running"


class SlotPool:
    """Hands out ids in ``[first, first + total)``, each to one owner at a time.

    Freed ids are reused last-in first-out, so that the hottest memory is taken first. An id's
    generation grows whenever it is freed: who remembers an older one remembers something that is
    gone.
    """

    def __init__(self, name: str, total: int, first: int = 0) -> None:
        self.name = name
        self.total = total
        self._first = first
        self._free = list(range(first + total - 1, first - 1, -1))
        self._owners: dict[int, str] = {}
        self._kinds: Counter[str] = Counter()
        self._generations = [0] * total

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def count(self) -> PoolCount:
        return PoolCount(len(self._free), self.total)

    def allocate(self, count: int, owner: str) -> tuple[int, ...] | None:
        """``count`` ids that now belong to ``owner``, or None, and nothing taken, when there are
        not so many."""
        if count > len(self._free):
            return None
        slots = tuple(self._free.pop() for _ in range(count))
        self._owners.update(dict.fromkeys(slots, owner))
        self._kinds[_kind(owner)] += count
        return slots

    def move(self, slots: Iterable[int], owner: str, new_owner: str) -> None:
        """Give ids to another owner. Raises InvariantViolation, and moves nothing, unless ``owner``
        owns them all."""
        slots = tuple(slots)
        for slot in slots:
            if self._owners.get(slot) != owner:
                whose = self._owners.get(slot, "nobody")
                raise InvariantViolation(f"{self.name} {slot} is {whose}'s, not {owner}'s to give")
        self._owners.update(dict.fromkeys(slots, new_owner))
        self._kinds[_kind(owner)] -= len(slots)
        self._kinds[_kind(new_owner)] += len(slots)

    def owner(self, slot: int) -> str | None:
        """Whose an id is now; None while it is free."""
        return self._owners.get(slot)

    def generation(self, slot: int) -> int:
        """How often an id was freed so far."""
        return self._generations[slot - self._first]

    def free(self, slots: Iterable[int]) -> None:
        """Take back ids. Raises InvariantViolation if nobody owns one."""
        for slot in slots:
            owner = self._owners.pop(slot, None)
            if owner is None:
                raise InvariantViolation(f"{self.name} {slot} was freed but has no owner")
            self._kinds[_kind(owner)] -= 1
            self._generations[slot - self._first] += 1
            self._free.append(slot)

    @property
    def occupancy(self) -> Occupancy:
        kinds = self._kinds
        return Occupancy(
            free=len(self._free),
            running=kinds["running"],
            cached=kinds["cached"],
            in_transfer=kinds["in transfer"],
            quarantined=kinds["quarantined"],
        )

    def check_conserved(self) -> None:
        """free + owned == total, each id once. Raises InvariantViolation naming the ids."""
        everyone = set(range(self._first, self._first + self.total))
        free, owned = set(self._free), set(self._owners)
        if len(free) != len(self._free) or free & owned or free | owned != everyone:
            raise InvariantViolation(
                f"{self.name}: twice {sorted(free & owned)}, lost {sorted(everyone - free - owned)}"
            )

    def owners(self) -> dict[int, str]:
        """Who owns what now, for reports."""
        return dict(self._owners)
