"""Finding tails by their tokens, against looking at each."""

from __future__ import annotations

import random

import pytest

from stateferry.cache.entries import (
    Point,
    Tail,
    add_sorted,
    common_tokens,
    longest_match,
    remove_sorted,
    tails_covering,
    tails_within,
)
from stateferry.prefix.prefix_hash import decode_tokens, encode_tokens
from stateferry.prefix.radix_tree import Node

ROOT = Point(Node(b"", 0, 0, None, []), None)


def shared(one: bytes, other: bytes) -> int:
    pairs = zip(decode_tokens(one), decode_tokens(other), strict=False)
    count = 0
    for a, b in pairs:
        if a != b:
            break
        count += 1
    return count


@pytest.mark.parametrize("seed", range(4))
def test_all_searches_agree_with_looking_at_each(seed: int) -> None:
    """Token 256 and 1 have the same bytes in another order: bytes shared are not tokens shared."""
    rng, tails = random.Random(seed), list[Tail]()
    found = dict.fromkeys(("within", "covering", "part"), 0)
    for _ in range(600):
        tokens = encode_tokens(rng.choices((0, 1, 256, 257), k=rng.randint(1, 7)))
        within = {tail.tokens for tail in tails_within(tails, tokens)}
        others = [tail.tokens for tail in tails]
        assert within == {t for t in others if tokens.startswith(t) and t != tokens}
        covering = [tail.tokens for tail in tails_covering(tails, tokens)]
        assert covering == sorted(t for t in others if t.startswith(tokens))
        best, rows = longest_match(tails, tokens)
        assert rows == max((shared(t, tokens) for t in others), default=0)
        assert (best is None) == (rows == 0)
        assert best is None or common_tokens(best.tokens, tokens) == rows
        found["within"] += len(within) > 1
        found["covering"] += len(covering) > 1
        found["part"] += 0 < rows < len(tokens) // 4
        if tokens not in others:
            add_sorted(tails, Tail(ROOT, tokens, 0, (), 1))
        if len(tails) > 30:
            remove_sorted(tails, rng.choice(tails))
        assert [t.tokens for t in tails] == sorted(t.tokens for t in tails)
    assert all(count > 20 for count in found.values()), found
