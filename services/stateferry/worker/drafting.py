"""From the settings of speculation to what an engine needs for it."""

from __future__ import annotations

from stateferry.config import SpeculationSection
from stateferry.core.errors import ConfigError
from stateferry.drafting.speculator import Speculator

DRAFTERS = ("off", "ngram")


def most_guesses(section: SpeculationSection, grid: int) -> int:
    """Of one sequence in one step; 0 without speculation. Raises ConfigError."""
    if section.drafter not in DRAFTERS:
        problem = f"{section.drafter!r} is none of {', '.join(DRAFTERS)}"
        raise ConfigError("speculation.drafter", problem)
    if section.drafter == "off":
        return 0
    # With the token that they follow they are one path, which may pass one grid point.
    if section.draft_tokens >= grid:
        problem = f"{section.draft_tokens} is not less than the grid of {grid}: set {grid - 1}"
        raise ConfigError("speculation.draft_tokens", problem)
    return section.draft_tokens


def draft_rows(guesses: int) -> int:
    """Rows of one sequence in a verification: the token that the guesses follow is one."""
    return 1 + guesses if guesses else 0


def speculator(section: SpeculationSection, grid: int) -> Speculator | None:
    """None without speculation. Raises ConfigError."""
    most = most_guesses(section, grid)
    return Speculator(most) if most else None
