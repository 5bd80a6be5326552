"""The receiving worker's view: what it reserved room for, and what has arrived."""

from __future__ import annotations

import asyncio
import enum
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType

from stateferry.core.errors import (
    DeadlineExceeded,
    HandoffError,
    InvariantViolation,
    Overloaded,
    Refused,
    StateferryError,
)
from stateferry.core.ids import WorkerKey
from stateferry.transfer.frames import RejectReason
from stateferry.transfer.manifest import Manifest, Segment
from stateferry.transfer.staging import StagingBlock

_REMEMBERED_CLOSED = 16384


class ReceivedHandoff:
    """A sealed hand-off: every segment arrived and matched its checksum.

    The segments' ``data`` lie in staging and are gone after ``release``, which is idempotent; as a
    context manager it releases at the end. ``duration_s`` runs from the manifest to the seal.
    """

    def __init__(
        self,
        manifest: Manifest,
        segments: Sequence[Segment],
        block: StagingBlock,
        transport: str,
        duration_s: float,
    ) -> None:
        self.manifest = manifest
        self.transport = transport
        self.size_bytes = manifest.size_bytes
        self.duration_s = duration_s
        self._segments: Sequence[Segment] | None = segments
        self._block = block

    @property
    def segments(self) -> Sequence[Segment]:
        """In manifest order. Raises InvariantViolation after ``release``."""
        if self._segments is None:
            raise InvariantViolation("the hand-off was released, its bytes are gone")
        return self._segments

    def release(self) -> None:
        """Give the staging back."""
        self._segments = None
        self._block.release()

    def __enter__(self) -> ReceivedHandoff:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()


class _Status(enum.Enum):
    WAITING = "waiting"
    RECEIVING = "receiving"
    SEALED = "sealed"
    CLOSED = "closed"


@dataclass(frozen=True, slots=True)
class ExpectedPush:
    """The one push that is allowed; ``max_bytes`` bounds its segments."""

    request_id: str
    epoch: int
    sender: WorkerKey
    max_bytes: int

    @property
    def attempt(self) -> tuple[str, int]:
        return self.request_id, self.epoch


class Expectation:
    """Room reserved for one push. Its owner must end it: take the hand-off, or ``cancel``."""

    def __init__(self, push: ExpectedPush, book: ExpectationBook) -> None:
        self.push = push
        self._book = book
        self._status = _Status.WAITING
        self._taken = False
        self._outcome: asyncio.Future[ReceivedHandoff] = asyncio.get_running_loop().create_future()

    async def sealed(self, timeout_s: float) -> ReceivedHandoff:
        """Wait for the hand-off; the caller then owns it and must release it.

        Raises DeadlineExceeded after ``timeout_s``, which also cancels; PeerLost when the sender
        broke off in the middle; IntegrityError for wrong bytes; HandoffError when cancelled.
        A cancelled wait changes nothing: ``cancel`` is still to be called.
        """
        if self._taken:
            raise InvariantViolation("the hand-off was taken already")
        await asyncio.wait({self._outcome}, timeout=timeout_s)
        if not self._outcome.done():
            self.cancel()
            raise DeadlineExceeded(f"no hand-off within {timeout_s} s")
        received = self._outcome.result()
        self._taken = True
        return received

    def cancel(self) -> None:
        """Give the reservation up, at any time; idempotent.

        A later push is rejected. A transfer in flight is received to its end, or to its failure,
        and then dropped; only then is its staging free. A hand-off that was taken is not touched.
        """
        if self._status is _Status.SEALED and not self._taken:
            self._outcome.result().release()
        self.fail(HandoffError("the hand-off was cancelled"))

    # What follows is called by Session only.

    @property
    def outcome(self) -> asyncio.Future[ReceivedHandoff]:
        """Done as soon as the hand-off is sealed, failed or cancelled."""
        return self._outcome

    @property
    def is_free(self) -> bool:
        """Whether no push has claimed it so far."""
        return self._status is _Status.WAITING

    def begin(self) -> None:
        self._status = _Status.RECEIVING

    def postpone(self) -> None:
        """The push was turned away for lack of staging; the sender may try again."""
        if self._status is _Status.RECEIVING:
            self._status = _Status.WAITING

    def seal(self, received: ReceivedHandoff) -> bool:
        """Hand over. False if nobody wants it any more: the caller keeps ``received``."""
        if self._status is not _Status.RECEIVING:
            return False
        self._status = _Status.SEALED
        self._book.close(self, RejectReason.DUPLICATE)
        self._outcome.set_result(received)
        return True

    def fail(self, error: StateferryError) -> None:
        """End it with ``error``, unless it has ended."""
        if self._outcome.done():
            return
        self._status = _Status.CLOSED
        self._book.close(self, RejectReason.CLOSED)
        self._outcome.set_exception(error)
        # Take it: an owner that has gone away must not cause a log entry.
        self._outcome.exception()


class ExpectationBook:
    """All open expectations by attempt, and a bounded memory of those that have ended."""

    def __init__(self, me: WorkerKey, max_open: int) -> None:
        self._me = me
        self._max_open = max_open
        self._open: dict[tuple[str, int], Expectation] = {}
        self._closed: OrderedDict[tuple[str, int], RejectReason] = OrderedDict()

    def __len__(self) -> int:
        return len(self._open)

    def add(self, push: ExpectedPush) -> Expectation:
        """Raises Overloaded when there are too many, Refused for an attempt used before."""
        if push.attempt in self._open or push.attempt in self._closed:
            raise Refused(f"request {push.request_id}, epoch {push.epoch} was expected before")
        if len(self._open) >= self._max_open:
            raise Overloaded(f"{self._max_open} hand-offs are expected already")
        expectation = Expectation(push, self)
        self._open[push.attempt] = expectation
        return expectation

    def claim(self, manifest: Manifest, sender: WorkerKey) -> Expectation | RejectReason:
        """The expectation that this push of ``sender`` fulfils, now receiving; or why not."""
        attempt = (manifest.request_id, manifest.epoch)
        if manifest.receiver != self._me:
            return RejectReason.WRONG_RECEIVER
        expectation = self._open.get(attempt)
        if expectation is None:
            return self._closed.get(attempt) or self._no_such(manifest.request_id)
        if sender != expectation.push.sender or sender != manifest.sender:
            return RejectReason.WRONG_SENDER
        if not expectation.is_free:
            return RejectReason.DUPLICATE
        if manifest.size_bytes > expectation.push.max_bytes:
            return RejectReason.OVERSIZE
        expectation.begin()
        return expectation

    def close(self, expectation: Expectation, late_pushes: RejectReason) -> None:
        """Forget an ended expectation, but remember what to answer to late pushes."""
        attempt = expectation.push.attempt
        self._open.pop(attempt, None)
        self._closed[attempt] = late_pushes
        if len(self._closed) > _REMEMBERED_CLOSED:
            self._closed.popitem(last=False)

    def fail_all(self, error: StateferryError) -> None:
        for expectation in list(self._open.values()):
            expectation.fail(error)

    def _no_such(self, request_id: str) -> RejectReason:
        if any(request == request_id for request, _ in self._open):
            return RejectReason.WRONG_EPOCH
        return RejectReason.UNEXPECTED
