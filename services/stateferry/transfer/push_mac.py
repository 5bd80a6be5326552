"""The keyed MAC of a PUSH: only a process of our cluster can have written it.

The manifest holds every segment's checksum, whose hand-off it is and both incarnations, so the MAC
vouches for all of them, and the attempt's single use makes a copy of it worthless.
"""

from __future__ import annotations

from stateferry.core.cluster_key import MAC_BYTES, ClusterKey
from stateferry.core.errors import FrameError

_PURPOSE = b"push"


class PushMac:
    """Body of a PUSH: ``MAC | manifest`` with a key, else the manifest alone. Both sides must have
    the same key, or both none."""

    def __init__(self, key: ClusterKey | None) -> None:
        self._key = key

    def wrap(self, sequence: int, manifest: bytes) -> bytes:
        """The body of push number ``sequence``."""
        if self._key is None:
            return manifest
        return self._key.mac(_PURPOSE, _vouched(sequence, manifest)) + manifest

    def unwrap(self, sequence: int, body: bytes) -> bytes:
        """The manifest in ``body``. Raises FrameError unless its MAC is ours."""
        if self._key is None:
            return body
        mac, manifest = body[:MAC_BYTES], body[MAC_BYTES:]
        if not self._key.is_mac(mac, _PURPOSE, _vouched(sequence, manifest)):
            raise FrameError("the push is not signed with our cluster's key")
        return manifest


def _vouched(sequence: int, manifest: bytes) -> bytes:
    return sequence.to_bytes(4, "little") + manifest
