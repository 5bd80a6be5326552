"""Which tile a launch of the plain step's kernels takes: looked up, never tried out."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

_TABLE = Path(__file__).parents[1] / "tuning" / "state_step.json"


@dataclass(frozen=True, slots=True)
class StepTile:
    block_rows: int
    num_warps: int


@lru_cache(maxsize=4096)
def step_tile(state_bytes: int, headdim: int, dstate: int, work: int) -> StepTile:
    """The tile for states of ``state_bytes`` an element and a launch of work = batch * nheads."""
    for *key, up_to_work, block_rows, num_warps in _rows():
        wanted = zip(key, (state_bytes, headdim, dstate), strict=True)
        if all(k is None or k == value for k, value in wanted) and (
            up_to_work is None or work <= up_to_work
        ):
            return StepTile(block_rows, num_warps)
    raise ValueError(f"{_TABLE.name}: no row for {state_bytes} bytes, {headdim} x {dstate}")


@cache
def _rows() -> list[list[Any]]:
    rows: list[list[Any]] = json.loads(_TABLE.read_text())["rows"]
    return rows
