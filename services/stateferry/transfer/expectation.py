"""The receiving worker's view: what it reserved room for, and what has arrived."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType

from stateferry.core.errors import (
    DeadlineExceeded,
    HandoffError,
    InvariantViolation,
    StateferryError,
)
from stateferry.core.ids import WorkerKey
from stateferry.transfer.manifest import Manifest, Segment
from stateferry.transfer.protocol.reasons import RejectReason
from stateferry.transfer.protocol.receiving import AttemptBook, ExpectedPush, Landing, Phase
from stateferry.transfer.staging import StagingBlock

# Copies a part to where it belongs; called in order, and awaited before the last part is given.
OnPart = Callable[["ReceivedHandoff"], Awaitable[None]]


class ReceivedHandoff:
    """A sealed hand-off, or a part of one: every segment arrived and matched its checksum.

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


class Expectation:
    """Room reserved for one hand-off. Its owner must end it: take the hand-off, or ``cancel``; and,
    if it comes in parts, wait for ``settled`` before it gives the room to somebody else."""

    def __init__(
        self, push: ExpectedPush, book: ExpectationBook, on_part: OnPart | None = None
    ) -> None:
        self.push = push
        self._book = book
        self._attempt = book.attempts.reserve(push)
        self._on_part = on_part
        self._copying: asyncio.Task[None] | None = None
        self._taken = False
        self._outcome: asyncio.Future[ReceivedHandoff] = asyncio.get_running_loop().create_future()

    async def sealed(self, timeout_s: float) -> ReceivedHandoff:
        """Wait for the hand-off, of one in parts for its last part, once the others have been
        copied; the caller then owns it and must release it.

        Raises DeadlineExceeded after ``timeout_s``, which also cancels; PeerLost when the sender
        broke off in the middle; IntegrityError for wrong bytes; HandoffError when cancelled; what
        ``on_part`` raised. A cancelled wait changes nothing: ``cancel`` is still to be called.
        """
        if self._taken:
            raise InvariantViolation("the hand-off was taken already")
        await asyncio.wait({self._outcome}, timeout=timeout_s)
        if not self._outcome.done():
            self.cancel()
            raise DeadlineExceeded(f"no hand-off within {timeout_s} s")
        received = self._outcome.result()
        if self._copying is not None:
            try:
                await asyncio.shield(self._copying)
            except BaseException:
                received.release()
                raise
        self._taken = True
        return received

    async def settled(self) -> None:
        """Returns once ``on_part`` is not running, and never will be again; after ``cancel``.
        Never returns before that, even when cancelled."""
        copying, cancelled = self._copying, False
        while copying is not None and not copying.done():
            try:
                await asyncio.wait({copying})
            except asyncio.CancelledError:
                cancelled = True
        if cancelled:
            raise asyncio.CancelledError

    def cancel(self) -> None:
        """Give the reservation up, at any time; idempotent.

        A later push is rejected. A transfer in flight is received to its end, or to its failure,
        and then dropped; only then is its staging free. A hand-off that was taken is not touched.
        """
        if self._attempt.phase is Phase.SEALED and not self._taken:
            self._outcome.result().release()
        self.fail(HandoffError("the hand-off was cancelled"))

    # What follows is called by Session only.

    @property
    def outcome(self) -> asyncio.Future[ReceivedHandoff]:
        """Done as soon as the hand-off is sealed, failed or cancelled."""
        return self._outcome

    @property
    def is_free(self) -> bool:
        """Whether the next part may come: none is arriving, and more are wanted."""
        return self._attempt.phase is Phase.WAITING

    def postpone(self) -> None:
        """The push was turned away for lack of staging; the sender may try again."""
        self._book.attempts.postpone(self._attempt)

    def land(self, received: ReceivedHandoff) -> bool:
        """Hand over what has arrived. False if nobody wants it: the caller keeps ``received``."""
        landing = self._book.attempts.land(self._attempt)
        if landing is Landing.DROP:
            return False
        if landing is Landing.KEEP:
            self._copying = asyncio.ensure_future(self._copy(received, self._copying))
            # Take its error: whoever waits for the hand-off gets it from there.
            self._copying.add_done_callback(lambda task: task.cancelled() or task.exception())
            return True
        self._book.forget(self)
        self._outcome.set_result(received)
        return True

    def fail(self, error: StateferryError) -> None:
        """End it with ``error``, unless it has ended."""
        if not self._book.attempts.close(self._attempt):
            return
        self._book.forget(self)
        self._outcome.set_exception(error)
        # Take it: an owner that has gone away must not cause a log entry.
        self._outcome.exception()

    async def _copy(self, received: ReceivedHandoff, before: asyncio.Task[None] | None) -> None:
        with received:
            if before is not None:
                await before
            if self._on_part is None or self._attempt.phase is Phase.CLOSED:
                return
            try:
                await self._on_part(received)
            except StateferryError as error:
                self.fail(error)
                raise


class ExpectationBook:
    """The machine's attempts, with what this process waits for behind each."""

    def __init__(self, me: WorkerKey, max_open: int) -> None:
        self.attempts = AttemptBook(me, max_open)
        self._open: dict[tuple[str, int], Expectation] = {}

    def __len__(self) -> int:
        return len(self.attempts)

    def add(self, push: ExpectedPush, on_part: OnPart | None = None) -> Expectation:
        """Raises Overloaded when there are too many, Refused for an attempt used before."""
        expectation = Expectation(push, self, on_part)
        self._open[push.attempt] = expectation
        return expectation

    def claim(self, manifest: Manifest, sender: WorkerKey) -> Expectation | RejectReason:
        """The expectation that this push of ``sender`` fulfils, now receiving; or why not."""
        claimed = self.attempts.claim(manifest.header, sender)
        return claimed if isinstance(claimed, RejectReason) else self._open[claimed.push.attempt]

    def forget(self, expectation: Expectation) -> None:
        """It has ended."""
        self._open.pop(expectation.push.attempt, None)

    def fail_all(self, error: StateferryError) -> None:
        for expectation in list(self._open.values()):
            expectation.fail(error)
