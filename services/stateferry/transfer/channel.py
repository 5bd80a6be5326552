"""Control messages over a connection: one reader, one writer, one reused receive buffer."""

from __future__ import annotations

import numpy as np

from stateferry.core.errors import FrameError
from stateferry.transfer.frames import (
    CONTROL_MAX_BYTES,
    HEADER_BYTES,
    Frame,
    FrameType,
    decode_frame,
    encode_frame,
)
from stateferry.transfer.transport import Connection


class Channel:
    """One side of a connection, for control messages. DATA goes to ``connection`` directly."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self._buffer = np.zeros(CONTROL_MAX_BYTES, dtype=np.uint8)

    async def send(
        self, frame_type: FrameType, sequence: int, body: bytes, timeout_s: float
    ) -> None:
        """Raises PeerLost."""
        message = encode_frame(Frame(frame_type, sequence, body))
        await self.connection.send(np.frombuffer(message, dtype=np.uint8), timeout_s)

    async def read(self, timeout_s: float | None) -> Frame:
        """The next control message. Raises PeerLost or FrameError; then the connection is broken.

        Mutates the receive buffer. Its header is wiped first: a message that is too short must not
        be completed by what an older one left behind.
        """
        self._buffer[:HEADER_BYTES] = 0
        await self.connection.recv_into(self._buffer, timeout_s)
        try:
            return decode_frame(self._buffer.data)
        except FrameError:
            self.connection.abort()
            raise
