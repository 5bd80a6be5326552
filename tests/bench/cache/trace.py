"""Recorded traffic in the Mooncake format, made small: one JSON object per line, with
``input_length`` and ``output_length`` in tokens and ``hash_ids``, one per block of 512 prompt
tokens. Prompts whose first ids are equal begin with the same blocks."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.cache.workload import Ids, Turn, Workload, in_order

BLOCK_TOKENS = 512


@dataclass(frozen=True)
class Record:
    """One line."""

    input_length: int
    output_length: int
    hash_ids: tuple[int, ...]


def read_records(path: Path) -> list[Record]:
    """In the order of arrival. Raises ValueError that names the line which is none."""
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            entry = json.loads(line)
            ids = tuple(int(block) for block in entry["hash_ids"])
            record = Record(int(entry["input_length"]), int(entry["output_length"]), ids)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: {error!r}") from None
        if not 0 < record.input_length <= BLOCK_TOKENS * len(ids):
            raise ValueError(f"{path}, line {number}: {len(ids)} blocks hold another prompt")
        records.append(record)
    if not records:
        raise ValueError(f"{path} has no line")
    return records


def families(records: Sequence[Record], most: int) -> list[Record]:
    """About ``most`` of the records, or all: those whose first block's number falls into a part of
    all numbers. Whoever shares a prefix is taken or left together, so reuse stays what it was."""
    parts = max(1, round(len(records) / most))
    return [r for r in records if random.Random(r.hash_ids[0]).randrange(parts) == 0]


def divisor(records: Sequence[Record], most_tokens: int) -> int:
    """The least power of two that makes all requests fit into ``most_tokens``. Raises ValueError
    when blocks would vanish."""
    longest = max(record.input_length + record.output_length for record in records)
    divide = 1
    while longest // divide + 1 > most_tokens:
        divide *= 2
    if divide > BLOCK_TOKENS:
        raise ValueError(f"a request of {longest} tokens does not fit into {most_tokens}")
    return divide


def scaled(
    name: str, records: Sequence[Record], *, divide: int, seed: int, vocab_size: int
) -> Workload:
    """All lengths divided by ``divide``, a power of two; a block is the same tokens wherever it
    is."""
    size = BLOCK_TOKENS // divide
    known: dict[int, Ids] = {}

    def block(number: int) -> Ids:
        if number not in known:
            rng = random.Random(f"{seed}:{number}")
            known[number] = tuple(rng.randrange(3, vocab_size) for _ in range(size))
        return known[number]

    requests = []
    for record in records:
        length = max(record.input_length // divide, 1)
        ids = [token for number in record.hash_ids for token in block(number)][:length]
        requests.append((Turn(tuple(ids), max(record.output_length // divide, 1)),))
    return in_order(name, requests)
