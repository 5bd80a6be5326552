"""The secret that all processes of a cluster share, and what it vouches for."""

from __future__ import annotations

import hashlib
import hmac

from stateferry.core.errors import ConfigError

MIN_BYTES = 16
MAC_BYTES = 32


class ClusterKey:
    """Signs and checks messages between our own processes with HMAC-SHA256."""

    def __init__(self, secret: bytes) -> None:
        """Raises ConfigError when the secret is shorter than 16 bytes."""
        if len(secret) < MIN_BYTES:
            raise ConfigError("cluster.key", f"needs at least {MIN_BYTES} bytes")
        self._secret = secret

    def mac(self, purpose: bytes, body: bytes) -> bytes:
        """32 bytes. ``purpose`` keeps a signature made for one use from passing for another."""
        tagged = len(purpose).to_bytes(1, "little") + purpose + body
        return hmac.digest(self._secret, tagged, hashlib.sha256)

    def is_mac(self, mac: bytes, purpose: bytes, body: bytes) -> bool:
        """Whether ``mac`` is ours, in constant time."""
        return hmac.compare_digest(mac, self.mac(purpose, body))
