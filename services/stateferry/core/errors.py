"""The error tree. api/status.py maps it to gRPC status codes, http_front/errors.py to HTTP's.

::

    StateferryError
      + ConfigError             a setting is wrong; the message names the key
      + InvalidRequest          the caller sent something we will never accept; names the field
      + Overloaded              a bounded queue or pool is full; try again later
      + DeadlineExceeded        time ran out before the work was done
      + Unavailable             somebody we need is not there now
        - NoWorker              no live worker of a role fits the request
        - WorkerLost            a worker went away in the middle of a request
        - PeerLost              a transfer endpoint broke or stopped making progress
        - PeerUnreachable       a worker reports such of its peer; what the router makes of it
      + Refused                 a message that is well formed but must not be honoured
        - TicketError           forged, expired, reused, or meant for another worker or epoch
        - HandshakeMismatch     two workers disagree on a fingerprint; names the field
      + HandoffError            a hand-off cannot be trusted; only its request is hurt
        - FrameError            a frame is malformed or larger than allowed
        - IntegrityError        bytes differ from their checksum
      + GuideBroke              a guide needed more work than one token may take; ends its request
      + ModelError              weights or configuration we cannot serve; names the tensor or option
      + InvariantViolation      a bug of ours; never the caller's fault
"""

from __future__ import annotations


class StateferryError(Exception):
    """Root of every error this project raises on purpose."""


class ConfigError(StateferryError):
    """A setting is wrong. ``key`` is the dotted name a user can change."""

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(f"{key}: {problem}")
        self.key = key


class InvalidRequest(StateferryError):
    """A request that can never be accepted. ``field`` is the proto path of the culprit."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field


class Overloaded(StateferryError):
    """A bounded queue or pool is full. ``retry_after_s`` is a hint, not a promise."""

    def __init__(self, problem: str, retry_after_s: float = 1.0) -> None:
        super().__init__(problem)
        self.retry_after_s = retry_after_s


class DeadlineExceeded(StateferryError):
    """The deadline passed before the work was done."""


class Unavailable(StateferryError):
    """Something the request needs is not there now; the same request may succeed later."""


class NoWorker(Unavailable):
    """No live worker of the wanted role can take the request."""


class WorkerLost(Unavailable):
    """A worker went away while it held the request."""


class PeerLost(Unavailable):
    """A transfer endpoint broke, or made no progress within its deadline."""


class PeerUnreachable(Unavailable):
    """A worker says that the one which it hands over to, or takes over from, is not there."""


class Refused(StateferryError):
    """A well-formed message that must not be honoured."""


class TicketError(Refused):
    """A ticket that is forged, expired, already used, or meant for somebody else."""


class HandshakeMismatch(Refused):
    """Two workers differ in a property that both must share. ``field`` names it."""

    def __init__(self, field: str, ours: object, theirs: object) -> None:
        super().__init__(f"{field}: ours is {ours!r}, the peer's is {theirs!r}")
        self.field = field


class HandoffError(StateferryError):
    """A hand-off that cannot be trusted. The request it belongs to fails; nobody else does."""


class FrameError(HandoffError):
    """A frame that is malformed, or claims more than its limits allow."""


class IntegrityError(HandoffError):
    """Received bytes differ from the checksum their sender promised."""


class GuideBroke(StateferryError):
    """A guide met a limit in the middle of an output. Its request ends; nobody else is hurt."""


class ModelError(StateferryError):
    """A model directory we cannot serve; the message names the tensor or the option."""


class InvariantViolation(StateferryError):
    """Our own bookkeeping is broken. Always a bug; never caused by input."""
