"""Traffic that was not recorded, in the same form: patterns of reuse that traces are known for."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import count

from bench.cache.trace import BLOCK_TOKENS, Record


class _Writer:
    """Fresh blocks, and records from blocks."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self._numbers = count()

    def blocks(self, least: int, most: int) -> tuple[int, ...]:
        return tuple(next(self._numbers) for _ in range(self.rng.randint(least, most)))

    def record(self, blocks: tuple[int, ...]) -> Record:
        # The last block is filled in part.
        length = len(blocks) * BLOCK_TOKENS - self.rng.randrange(BLOCK_TOKENS)
        return Record(length, self.rng.choice((4, 40, 150, 350)), blocks)

    def rank(self, size: int) -> int:
        """Zipf's law with exponent 1."""
        return self.rng.choices(range(size), [1 / (n + 1) for n in range(size)])[0]


def conversations(seed: int, requests: int) -> list[Record]:
    """Each turn's prompt begins with the one before; a dozen preambles for all."""
    writer = _Writer(seed)
    preambles = [writer.blocks(1, 12) for _ in range(12)]
    talks: list[tuple[int, ...]] = []
    records = []
    for _ in range(requests):
        if len(talks) < 40 or writer.rng.random() < 0.25:
            talks = talks[-60:]
            talks.append(preambles[writer.rank(len(preambles))])
            place = len(talks) - 1
        else:
            place = writer.rng.randrange(len(talks))
        talks[place] += writer.blocks(1, 10)
        records.append(writer.record(talks[place]))
        if len(talks[place]) > 100:
            del talks[place]
    return records


def documents(seed: int, requests: int) -> list[Record]:
    """Short questions about long texts, few of which are popular."""
    writer = _Writer(seed)
    texts = [writer.blocks(10, 80) for _ in range(60)]
    return [
        writer.record(texts[writer.rank(len(texts))] + writer.blocks(1, 2)) for _ in range(requests)
    ]


def tools(seed: int, requests: int) -> list[Record]:
    """One long preamble for each of a few agents, then steps that each add to the same prompt, and
    prompts in between that nobody asks again."""
    writer = _Writer(seed)
    agents = [writer.blocks(8, 40) for _ in range(6)]
    records: list[Record] = []
    while len(records) < requests:
        if writer.rng.random() < 0.4:
            records.append(writer.record(writer.blocks(1, 60)))
            continue
        task = agents[writer.rank(len(agents))]
        for _ in range(writer.rng.randint(1, 5)):
            task += writer.blocks(1, 6)
            records.append(writer.record(task))
    return records[:requests]


PATTERNS: dict[str, Callable[[int, int], list[Record]]] = {
    "conversations": conversations,
    "documents": documents,
    "tools": tools,
}
