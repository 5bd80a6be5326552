"""From the settings of speculation to what an engine needs for it."""

from __future__ import annotations

from functools import partial

from stateferry.config import SpeculationSection
from stateferry.core.errors import ConfigError
from stateferry.drafting.ngram import NgramDrafter
from stateferry.drafting.speculator import Speculator
from stateferry.engine.runner import Drafts

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


def room_for_drafts(section: SpeculationSection, grid: int, sequences: int) -> Drafts | None:
    """Of so many sequences: the token that the guesses follow takes a row, too. None without
    speculation. Raises ConfigError."""
    guesses = most_guesses(section, grid)
    return Drafts(sequences, 1 + guesses, section.draft_paths) if guesses else None


def speculator(section: SpeculationSection, grid: int) -> Speculator | None:
    """None without speculation. Raises ConfigError."""
    most = most_guesses(section, grid)
    if not most:
        return None
    return Speculator(most, make=partial(NgramDrafter, paths=section.draft_paths))
