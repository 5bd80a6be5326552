"""What both processes of ``make bench-transfer`` must agree on."""

from __future__ import annotations

import numpy as np

from stateferry.core.fingerprint import PROTOCOL_VERSION, Fingerprint
from stateferry.core.ids import WorkerKey
from stateferry.transfer.limits import TransferLimits

FINGERPRINT = Fingerprint(PROTOCOL_VERSION, "bench", "w", "l", 64, "bfloat16", "cpu")
DECODE = WorkerKey("decode-0", 1)
PREFILL = WorkerKey("prefill-0", 1)
GRPC_METHOD = "/bench.Transfer/Push"
GRPC_MESSAGE_BYTES = 2 << 20
ACK = np.ones(1, dtype=np.uint8)


def limits(max_bytes: int) -> TransferLimits:
    """Room for one hand-off of ``max_bytes``."""
    return TransferLimits(
        max_handoff_bytes=max_bytes + (1 << 20),
        staging_bytes=max_bytes + (max_bytes >> 2) + (1 << 20),
        connect_timeout_s=20.0,
        handshake_timeout_s=20.0,
        progress_timeout_s=30.0,
        push_timeout_s=60.0,
    )
