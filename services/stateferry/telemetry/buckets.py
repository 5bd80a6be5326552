"""Histogram bounds, wide enough for CPUs (steps of milliseconds) and GPUs (tenths of one)."""

from __future__ import annotations

# Seconds of one kernel step or the gap between two tokens.
STEP_SECONDS = (
    0.0002, 0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02,
    0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0,
)  # fmt: skip

# Seconds that a caller waits: queues, first token, whole requests.
WAIT_SECONDS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.35, 0.5,
    0.75, 1.0, 1.5, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0,
)  # fmt: skip

# Seconds of one hand-off: shared memory takes milliseconds, TCP between hosts tens of them.
HANDOFF_SECONDS = (
    0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0,
)  # fmt: skip

# Bytes of one hand-off, 64 KiB to 4 GiB: from the bundled model to hybrids of tens of billions.
HANDOFF_BYTES = tuple(float(4**exponent) for exponent in range(8, 17))

# Sequences in one batch.
BATCH_ROWS = tuple(float(2**exponent) for exponent in range(10))

# Tokens in one step.
BATCH_TOKENS = tuple(float(2**exponent) for exponent in range(0, 16))
