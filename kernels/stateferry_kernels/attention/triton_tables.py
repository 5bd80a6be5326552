"""Which tokens a program of the attention kernels treats and where their keys lie: built from the
plan's integers, once for all layers of a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from stateferry_kernels.device_tables import device_array
from stateferry_kernels.kv_layer import KvPlan, KvSequence

Table = npt.NDArray[np.int64]


class KvTables(NamedTuple):
    """Device tables, int64."""

    tokens: torch.Tensor  # (total_tokens, 2): sequence, position; sequence -1 is padding
    pages: torch.Tensor  # (num_seqs, most_pages), as far as a sequence has some


def kv_tables(plan: KvPlan, device: torch.device) -> KvTables:
    """The plan's tables, built once and kept in ``plan.cache``."""
    key = f"kv_triton:{device}"
    if key not in plan.cache:
        plan.cache[key] = KvTables(
            device_array(token_rows(plan.sequences), device),
            device_array(page_rows(plan.sequences), device),
        )
    tables: KvTables = plan.cache[key]
    return tables


def kv_tiles(plan: KvPlan, most_tokens: int, device: torch.device) -> torch.Tensor:
    """(num_tiles, 3) int64: first token in the batch, tokens, sequence; -1 is padding."""
    if len(plan.sequences) == plan.total_tokens:
        most_tokens = 1
    key = f"kv_triton_tiles:{device}:{most_tokens}"
    if key not in plan.cache:
        tiles, first = [], 0
        for number, sequence in enumerate(plan.sequences):
            for begin in range(0, sequence.length, most_tokens):
                count = min(most_tokens, sequence.length - begin)
                tiles.append((first + begin, count, number))
            first += sequence.length
        plan.cache[key] = device_array(np.array(tiles, dtype=np.int64).reshape(-1, 3), device)
    table: torch.Tensor = plan.cache[key]
    return table


def token_rows(sequences: Sequence[KvSequence]) -> Table:
    """(total_tokens, 2): sequence, position."""
    lengths = [sequence.length for sequence in sequences]
    rows = np.empty((sum(lengths), 2), dtype=np.int64)
    rows[:, 0] = np.repeat(np.arange(len(lengths)), lengths)
    if len(rows) == len(lengths):
        rows[:, 1] = [sequence.start for sequence in sequences]
    else:
        rows[:, 1] = np.concatenate([np.arange(s.start, s.end) for s in sequences])
    return rows


def page_rows(sequences: Sequence[KvSequence]) -> Table:
    """(num_seqs, most_pages): all of each sequence's, 0 past them."""
    width = max((len(sequence.pages) for sequence in sequences), default=0)
    rows = np.zeros((len(sequences), max(1, width)), dtype=np.int64)
    for row, sequence in zip(rows, sequences, strict=True):
        row[: len(sequence.pages)] = sequence.pages
    return rows
