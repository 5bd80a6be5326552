"""What two workers must share before one may continue the other's sequences."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass

from stateferry.core.errors import HandshakeMismatch

PROTOCOL_VERSION = 6


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Compared field by field at every handshake, so that a refusal can name what differs.

    ``weights`` is a digest of the model files; ``layout`` a digest of the geometry of
    recurrent state and KV; ``numerics`` names the kernels' order of summation: backends of
    equal names give equal bits.
    """

    protocol: int
    model: str
    weights: str
    layout: str
    grid: int
    dtype: str
    numerics: str

    def check_matches(self, peer: Fingerprint) -> None:
        """Raise HandshakeMismatch naming the first field in which ``peer`` differs."""
        for field in dataclasses.fields(self):
            ours, theirs = getattr(self, field.name), getattr(peer, field.name)
            if ours != theirs:
                raise HandshakeMismatch(field.name, ours, theirs)

    def digest(self) -> bytes:
        """SHA-256 over all fields, for messages too small to carry them."""
        parts = "\x1f".join(f"{f.name}={getattr(self, f.name)}" for f in dataclasses.fields(self))
        return hashlib.sha256(parts.encode()).digest()
