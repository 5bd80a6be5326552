"""A byte n-gram model with interpolated Kneser-Ney smoothing, on sorted numpy arrays.

The yardstick a neural model has to beat: order 5 means that a byte is predicted from the four
before it. A context is an integer in base 257 (symbol 256 is the end of a document), so counting
is sorting and looking up is a binary search.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

END = 256
SYMBOLS = 257
QUERY_BLOCK = 1 << 20

Symbols = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


def to_symbols(documents: list[bytes]) -> Symbols:
    """All documents in one sequence, an END before the first and after each."""
    joined = [np.array([END], dtype=np.int64)]
    for document in documents:
        joined.append(np.frombuffer(document, dtype=np.uint8).astype(np.int64))
        joined.append(np.array([END], dtype=np.int64))
    return np.concatenate(joined)


def grams(symbols: Symbols, order: int) -> Symbols:
    """The n-gram that ends at each position from `order - 1` on, as one integer each."""
    count = len(symbols) - order + 1
    keys = np.zeros(count, dtype=np.int64)
    for offset in range(order):
        keys = keys * SYMBOLS + symbols[offset : offset + count]
    return keys


@dataclasses.dataclass
class Level:
    """Counts of one order: sorted n-grams, and sums over the last symbol per context."""

    keys: Symbols
    counts: Symbols
    contexts: Symbols
    totals: Symbols
    followers: Symbols
    discount: float


def make_level(keys: Symbols, counts: Symbols) -> Level:
    """Sums per context; the discount is Ney's estimate n1 / (n1 + 2 n2)."""
    contexts, first = np.unique(keys // SYMBOLS, return_index=True)
    totals = np.add.reduceat(counts, first)
    followers = np.diff(np.append(first, len(keys)))
    ones, twos = int((counts == 1).sum()), int((counts == 2).sum())
    discount = ones / (ones + 2 * twos) if ones and twos else 0.5
    return Level(keys, counts, contexts, totals, followers, discount)


def fit(symbols: Symbols, order: int) -> list[Level]:
    """Levels 1..order. The top counts occurrences; lower ones count distinct left neighbours."""
    keys, counts = np.unique(grams(symbols, order), return_counts=True)
    levels = [make_level(keys, counts.astype(np.int64))]
    for lower in range(order - 1, 0, -1):
        # Each distinct longer gram contributes one to the gram left when its first symbol goes.
        keys, counts = np.unique(levels[0].keys % SYMBOLS**lower, return_counts=True)
        levels.insert(0, make_level(keys, counts.astype(np.int64)))
    return levels


def _lookup(table: Symbols, values: Symbols, queries: Symbols) -> Symbols:
    """values at the queries' places in the sorted table, 0 where a query is absent."""
    place = np.minimum(np.searchsorted(table, queries), len(table) - 1)
    return np.where(table[place] == queries, values[place], 0)


def probabilities(levels: list[Level], keys: Symbols) -> Floats:
    """P(last symbol | symbols before it) for each n-gram in `keys`, order = len(levels)."""
    result = np.full(len(keys), 1.0 / SYMBOLS)
    for order, level in enumerate(levels, start=1):
        gram = keys % SYMBOLS**order
        context = gram // SYMBOLS
        count = _lookup(level.keys, level.counts, gram)
        total = _lookup(level.contexts, level.totals, context)
        followers = _lookup(level.contexts, level.followers, context)
        seen = total > 0
        safe = np.maximum(total, 1)
        own = np.maximum(count - level.discount, 0.0) / safe
        rest = level.discount * followers / safe
        # An unseen context has nothing to say: keep the shorter context's estimate.
        result = np.where(seen, own + rest * result, result)
    return result


def total_bits(levels: list[Level], symbols: Symbols) -> float:
    """Bits for all symbols after the first, document ends included.

    The first `order - 1` symbols are predicted with the shorter contexts they have.
    """
    order = len(levels)
    bits = 0.0
    for position in range(1, min(order - 1, len(symbols))):
        key = grams(symbols[: position + 1], position + 1)
        bits -= float(np.log2(probabilities(levels[: position + 1], key)).sum())
    keys = grams(symbols, order)
    for start in range(0, len(keys), QUERY_BLOCK):
        block = keys[start : start + QUERY_BLOCK]
        bits -= float(np.log2(probabilities(levels, block)).sum())
    return bits
