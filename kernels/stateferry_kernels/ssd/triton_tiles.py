"""Which tile a launch of the grid form's kernels takes: looked up, never tried out."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

_TABLE = Path(__file__).parents[1] / "tuning" / "grid_form.json"
_SMALLEST_DOT = 16


@dataclass(frozen=True, slots=True)
class GridFormTile:
    """Raises ValueError for tiles that no product takes, or that Triton 3.9 compiles into wrong
    results on sm90: of 64 rows, in pipelined stages, by whole warp groups."""

    block_headdim: int
    block_tokens: int
    block_rows: int
    num_warps: int
    num_stages: int

    def __post_init__(self) -> None:
        for block in (self.block_headdim, self.block_tokens, self.block_rows):
            if block < _SMALLEST_DOT or block & (block - 1):
                raise ValueError(f"{self}: blocks are powers of two from {_SMALLEST_DOT}")
        if self.num_warps not in (1, 2, 4, 8, 16) or self.num_stages < 1:
            raise ValueError(f"{self}: no such num_warps or num_stages")
        by_warp_groups = self.num_warps % 4 == 0 and self.num_stages > 1
        if by_warp_groups and any(
            block % 64 == 0 for block in (self.block_headdim, self.block_rows)
        ):
            raise ValueError(f"{self}: Triton miscompiles these on sm90; num_stages must be 1")


@lru_cache(maxsize=4096)
def grid_form_tile(
    product_bytes: int, headdim: int, dstate: int, grid: int, rows: int, work: int
) -> GridFormTile:
    """The tile for a launch of work = walks * nheads, whose intervals evaluate up to ``rows``
    entries. product_bytes: of an element that products take. No block is larger than what it
    covers."""
    shape = (product_bytes, headdim, dstate, grid, rows, work)
    for *limits, block_headdim, block_tokens, block_rows, num_warps, num_stages in _rows():
        limited = zip(limits, shape, strict=True)
        if all(limit is None or size <= limit for limit, size in limited):
            return GridFormTile(
                min(block_headdim, covering_block(headdim)),
                min(block_tokens, covering_block(grid)),
                min(block_rows, covering_block(grid)),
                num_warps,
                num_stages,
            )
    raise ValueError(f"{_TABLE.name}: no row for {shape}")


@lru_cache(maxsize=4096)
def row_tile(product_bytes: int, headdim: int, dstate: int, grid: int, rows: int) -> GridFormTile:
    """The tile of kernels that evaluate ``rows`` of an interval at most and fold nothing. Its
    blocks of tokens are those of ``grid_form_tile``."""
    tile = grid_form_tile(product_bytes, headdim, dstate, grid, min(rows, _SMALLEST_DOT), 1)
    shape = (product_bytes, headdim, dstate, rows)
    for *limits, block_headdim, num_warps in _table()["row_tiles"]:
        limited = zip(limits, shape, strict=True)
        if all(limit is None or size <= limit for limit, size in limited):
            block = min(block_headdim, covering_block(headdim))
            return replace(tile, block_headdim=block, num_warps=num_warps, num_stages=1)
    return tile


def covering_block(size: int) -> int:
    """The smallest block that covers size."""
    return max(_SMALLEST_DOT, 1 << (size - 1).bit_length())


@cache
def _table() -> dict[str, Any]:
    table: dict[str, Any] = json.loads(_TABLE.read_text())
    return table


def _rows() -> list[list[Any]]:
    rows: list[list[Any]] = _table()["rows"]
    return rows
