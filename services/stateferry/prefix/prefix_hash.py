"""Token prefixes as bytes and as hashes, the same in every process.

A prefix is named at the grid only: hash ``i`` stands for the first ``i + 1`` whole intervals of a
prompt and, through the namespace that starts the chain, for whose they are and what would read
them.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence

TOKEN_BYTES = 4
HASH_BYTES = 16

# The one unsigned type of four bytes on every platform that has it; checked at import.
_TOKEN_TYPE = "I" if array("I").itemsize == TOKEN_BYTES else "L"
if array(_TOKEN_TYPE).itemsize != TOKEN_BYTES:
    raise ImportError("no array type of four bytes on this platform")

_DOMAIN = b"stateferry prefix 1"


def encode_tokens(token_ids: Sequence[int]) -> bytes:
    """Four bytes per token. What trees and hashes are made of: encode a prompt once and append.
    Raises OverflowError for an id outside [0, 2^32)."""
    return array(_TOKEN_TYPE, token_ids).tobytes()


def decode_tokens(encoded: bytes) -> tuple[int, ...]:
    """The tokens that ``encode_tokens`` was given."""
    tokens = array(_TOKEN_TYPE)
    tokens.frombytes(encoded)
    return tuple(tokens)


def namespace_of(parts: Iterable[str | bytes]) -> bytes:
    """32 bytes that start every chain of one namespace: SHA-256 over the length and the bytes of
    each part, so that ("ab", "c") and ("a", "bc") differ. Prefixes of different namespaces are
    never shared: the parts are the tenant's salt, the weights and the layout of state."""
    digest = hashlib.sha256(_DOMAIN)
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.digest()


def next_hash(previous: bytes, unit: bytes) -> bytes:
    """The chain's next link: ``previous`` is a namespace or a hash, ``unit`` one interval."""
    return hashlib.blake2b(unit, digest_size=HASH_BYTES, key=previous).digest()


def chain_hashes(namespace: bytes, encoded: bytes, grid: int) -> list[bytes]:
    """One hash of 16 bytes per whole grid interval; the tokens after the last one have none."""
    unit_bytes = grid * TOKEN_BYTES
    hashes = []
    link = namespace
    for end in range(unit_bytes, len(encoded) + 1, unit_bytes):
        link = next_hash(link, encoded[end - unit_bytes : end])
        hashes.append(link)
    return hashes
