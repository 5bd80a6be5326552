"""Which form and tiles the chunk scan takes: looked up, never tried out."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from stateferry_kernels.ssd.triton_tiles import covering_block

_TABLE = Path(__file__).parents[1] / "tuning" / "chunk_scan.json"


@dataclass(frozen=True, slots=True)
class SplitTile:
    """Two kernels: the states that intervals begin with, then all rows.

    Raises ValueError for tiles that Triton compiles into wrong results on sm90: of 64 rows, in
    pipelined stages, by whole warp groups. (With three stages and 64 rows the second kernel gave
    NaN for headdim 80.)
    """

    starts_headdim: int
    starts_dstate: int
    starts_warps: int
    starts_stages: int  # of its pipeline
    heads: int  # of one group, that share a product C . B
    block_headdim: int
    rest: int  # a smaller block for the channels after the first block_headdim; 0 for none
    block_rows: int
    num_warps: int
    num_stages: int = 1  # of the second kernel's pipeline through heads

    def __post_init__(self) -> None:
        starts = (self.starts_headdim, self.starts_warps, self.starts_stages)
        rows = (self.block_rows, self.num_warps, self.num_stages)
        for block, num_warps, num_stages in (starts, rows):
            if block % 64 or num_warps % 4 or num_stages == 1:
                continue
            raise ValueError(f"{self}: Triton miscompiles these on sm90")

    def check_covers(self, headdim: int) -> None:
        """Raises ValueError unless the second kernel's blocks are those of this headdim.

        With a rest the first block is read without a mask: past the end of a state that is smaller.
        (Once, with a headdim of 16 under a rest made for 80, that was an illegal access.)
        """
        if self.rest and not 0 < headdim - self.block_headdim <= self.rest:
            raise ValueError(
                f"{self}: blocks of {self.block_headdim} and {self.rest} are not for headdim "
                f"{headdim}"
            )


@lru_cache(maxsize=4096)
def scan_tile(
    product_bytes: int,
    headdim: int,
    dstate: int,
    grid: int,
    per_group: int,
    work: int | None = None,
) -> SplitTile | None:
    """The tiles for per_group heads in a group; None where only the walk of the grid form is there:
    shapes that nobody has tried these kernels on. product_bytes: of an element that products
    take; work: walks * nheads, many where it is None."""
    for *shape, up_to_grid, up_to_work, numbers in _rows():
        fits = up_to_work is None or (work is not None and work <= up_to_work)
        if shape == [product_bytes, headdim, dstate] and grid <= up_to_grid and fits:
            tile = SplitTile(*numbers)
            return replace(
                tile,
                heads=math.gcd(tile.heads, per_group),
                block_rows=min(tile.block_rows, covering_block(grid)),
            )
    return None


@cache
def _rows() -> list[list[Any]]:
    rows: list[list[Any]] = json.loads(_TABLE.read_text())["rows"]
    return rows
