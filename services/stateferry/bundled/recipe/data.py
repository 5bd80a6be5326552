"""Training windows drawn from token arrays, sources weighted, documents packed end to end."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt

from stateferry.bundled.recipe.sources import SOURCES

Starts = npt.NDArray[np.int64]


class TokenData:
    """One split: `tokens` is (num_tokens,) uint16, `table` lists (source, first, tokens, bytes)."""

    def __init__(self, work: Path, split: str) -> None:
        folder = work / "train"
        self.tokens = np.fromfile(folder / f"{split}.bin", dtype="<u2")
        rows = json.loads((folder / f"{split}.json").read_text(encoding="utf-8"))
        self.table: list[tuple[str, int, int, int]] = [tuple(row) for row in rows]
        if sum(row[2] for row in self.table) != len(self.tokens):
            raise ValueError(f"{folder}: the table does not describe the token file")

    def epoch(self, length: int, rng: np.random.Generator) -> Starts:
        """First tokens of the windows of one epoch, (num_windows,), shuffled.

        A window is `length + 1` tokens. Each source is cut at a fresh random phase, so that
        window borders differ between epochs; weight w gives floor(w) passes and a random part
        of one more.
        """
        weights = {source.name: source.weight for source in SOURCES}
        parts: list[Starts] = []
        for source, first, tokens, _ in self.table:
            weight = weights[source]
            while weight > 0:
                phase = int(rng.integers(0, length))
                starts = np.arange(first + phase, first + tokens - length, length, dtype=np.int64)
                if weight < 1:
                    starts = starts[rng.random(len(starts)) < weight]
                parts.append(starts)
                weight -= 1
        joined = np.concatenate(parts)
        rng.shuffle(joined)
        return joined

    def even_sample(self, length: int, count: int) -> Starts:
        """`count` windows spread evenly over the split, the same on every call."""
        last = max(len(self.tokens) - length - 1, 0)
        return np.linspace(0, last, count).astype(np.int64)
