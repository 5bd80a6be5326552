"""What travels beside the state: how far the sequence is, and the token to continue with."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from stateferry.core.errors import FrameError


@dataclass(frozen=True, slots=True)
class HandoffMeta:
    """``position`` tokens are folded into the state; ``first_token_id`` is consumed next."""

    position: int
    first_token_id: int

    def encode(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def decode(cls, payload: bytes) -> HandoffMeta:
        """Raises FrameError on anything but exactly these two non-negative integers."""
        try:
            fields = json.loads(payload)
            meta = cls(**fields)
        except (ValueError, TypeError) as error:
            raise FrameError(f"hand-off payload: {error}") from error
        for value in (meta.position, meta.first_token_id):
            if type(value) is not int or value < 0:
                raise FrameError(f"hand-off payload: {value!r} is not a position or token id")
        return meta
