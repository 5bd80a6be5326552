"""A free list of numbered places."""

from __future__ import annotations

from collections.abc import Iterable

from stateferry.core.errors import InvariantViolation
from stateferry.core.worker import PoolCount


class SlotPool:
    """Hands out ids in ``[first, first + total)``, each to one owner at a time.

    Freed ids are reused last-in first-out, so that the hottest memory is taken first.
    """

    def __init__(self, name: str, total: int, first: int = 0) -> None:
        self.name = name
        self.total = total
        self._first = first
        self._free = list(range(first + total - 1, first - 1, -1))
        self._owners: dict[int, str] = {}

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
        return slots

    def free(self, slots: Iterable[int]) -> None:
        """Take back ids. Raises InvariantViolation if nobody owns one."""
        for slot in slots:
            if self._owners.pop(slot, None) is None:
                raise InvariantViolation(f"{self.name} {slot} was freed but has no owner")
            self._free.append(slot)

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
