"""Hashes name a prefix and whose it is, the same in every process."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest

from stateferry.prefix.prefix_hash import (
    HASH_BYTES,
    TOKEN_BYTES,
    chain_hashes,
    decode_tokens,
    encode_tokens,
    namespace_of,
)

TENANT = namespace_of(("tenant", "weights", "layout"))


def test_tokens_come_back() -> None:
    tokens = (0, 1, 255, 256, 2**31, 2**32 - 1)
    assert len(encode_tokens(tokens)) == TOKEN_BYTES * len(tokens)
    assert decode_tokens(encode_tokens(tokens)) == tokens
    assert encode_tokens(tokens[:2]) + encode_tokens(tokens[2:]) == encode_tokens(tokens)


@pytest.mark.parametrize("token", [-1, 2**32])
def test_a_token_that_does_not_fit_is_an_error(token: int) -> None:
    with pytest.raises(OverflowError):
        encode_tokens([token])


def test_one_hash_per_whole_interval() -> None:
    for length in range(13):
        hashes = chain_hashes(TENANT, encode_tokens(range(length)), 4)
        assert len(hashes) == length // 4 and all(len(h) == HASH_BYTES for h in hashes)
        assert hashes == chain_hashes(TENANT, encode_tokens(range(12)), 4)[: length // 4]


def test_a_hash_stands_for_everything_before_it() -> None:
    """One other token, anywhere, changes all hashes from there on and none before."""
    tokens = list(range(12))
    hashes = chain_hashes(TENANT, encode_tokens(tokens), 4)
    for changed in range(12):
        others = [*tokens[:changed], 99, *tokens[changed + 1 :]]
        other = chain_hashes(TENANT, encode_tokens(others), 4)
        same = [a == b for a, b in zip(hashes, other, strict=True)]
        assert same == [unit < changed // 4 for unit in range(3)]


def test_repeats_of_one_interval_have_different_hashes() -> None:
    hashes = chain_hashes(TENANT, encode_tokens([7] * 16), 4)
    assert len(set(hashes)) == 4


def test_namespaces_share_nothing() -> None:
    """Parts that read the same when joined are kept apart by their lengths."""
    parts = [("ab", "c"), ("a", "bc"), ("abc",), ("abc", ""), ("", "abc"), (b"\x00", "abc")]
    tokens = encode_tokens(range(4))
    for one, other in itertools.combinations(parts, 2):
        a, b = namespace_of(one), namespace_of(other)
        assert a != b and chain_hashes(a, tokens, 4) != chain_hashes(b, tokens, 4)


def test_another_process_gets_the_same_hashes() -> None:
    """A router's index is filled by other processes, each with its own seed of ``hash``."""
    code = (
        "from stateferry.prefix.prefix_hash import *\n"
        "space = namespace_of(('tenant', 'weights', 'layout'))\n"
        "print(chain_hashes(space, encode_tokens(range(64)), 16)[-1].hex())"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    here = chain_hashes(TENANT, encode_tokens(range(64)), 16)[-1].hex()
    assert done.stdout.strip() == here, done.stderr
