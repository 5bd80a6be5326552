"""One line of the table."""

from __future__ import annotations

from dataclasses import dataclass

OURS = "stateferry"


@dataclass(frozen=True)
class Row:
    """A contender at one size. ``speedup``: how many times as fast ours is; ``share``: of the time
    that the fewest bytes take at the measured bandwidth, where that is counted."""

    operation: str
    shape: str
    case: str
    contender: str
    us: float
    speedup: float | None = None
    share: float | None = None


def rows_of(
    operation: str,
    shape: str,
    case: str,
    times: dict[str, float],
    floors_us: dict[str, float] | None = None,
    ours: str = OURS,
) -> list[Row]:
    floors = floors_us or {}
    return [
        Row(
            operation,
            shape,
            case,
            name,
            us,
            None if name == ours or name.startswith(OURS) else us / times[ours],
            floors[name] / us if name in floors else None,
        )
        for name, us in times.items()
    ]
