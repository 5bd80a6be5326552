"""Every error of the tree has a status of its own; anything unforeseen is INTERNAL."""

from __future__ import annotations

import grpc
import pytest

from stateferry.api.status import code_of
from stateferry.core import errors

CODES = [
    (errors.InvalidRequest("field", "problem"), grpc.StatusCode.INVALID_ARGUMENT),
    (errors.Overloaded("full"), grpc.StatusCode.RESOURCE_EXHAUSTED),
    (errors.DeadlineExceeded("late"), grpc.StatusCode.DEADLINE_EXCEEDED),
    (errors.NoWorker("none"), grpc.StatusCode.UNAVAILABLE),
    (errors.WorkerLost("gone"), grpc.StatusCode.UNAVAILABLE),
    (errors.PeerLost("gone"), grpc.StatusCode.ABORTED),
    (errors.PeerUnreachable("gone"), grpc.StatusCode.UNAVAILABLE),
    (errors.TicketError("forged"), grpc.StatusCode.PERMISSION_DENIED),
    (errors.HandshakeMismatch("grid", 64, 32), grpc.StatusCode.FAILED_PRECONDITION),
    (errors.Refused("no"), grpc.StatusCode.FAILED_PRECONDITION),
    (errors.IntegrityError("differs"), grpc.StatusCode.DATA_LOSS),
    (errors.FrameError("short"), grpc.StatusCode.DATA_LOSS),
    (errors.GuideBroke("too complex"), grpc.StatusCode.OUT_OF_RANGE),
    (errors.ConfigError("a.b", "wrong"), grpc.StatusCode.FAILED_PRECONDITION),
    (errors.InvariantViolation("a bug"), grpc.StatusCode.INTERNAL),
    (errors.ModelError("bad weights"), grpc.StatusCode.INTERNAL),
    (KeyError("x"), grpc.StatusCode.INTERNAL),
]


@pytest.mark.parametrize(("error", "code"), CODES, ids=[type(e).__name__ for e, _ in CODES])
def test_code_of(error: Exception, code: grpc.StatusCode) -> None:
    assert code_of(error) is code
