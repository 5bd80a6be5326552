"""The life of one request inside the router: wait for workers, sign a ticket, run an attempt; and
another one, should that fail."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import partial

from stateferry.api.answer_codec import Completion, Timings, Usage
from stateferry.core.clock import Clock
from stateferry.core.errors import StateferryError
from stateferry.core.ids import WorkerKey
from stateferry.core.request import GenerationRequest
from stateferry.core.sampling import FinishReason, choice_seed
from stateferry.core.ticket import Ticket, TicketSigner
from stateferry.router.admission import Admission, Seats
from stateferry.router.attempt import Attempt, AttemptOrder, Declined, WorkerFigures
from stateferry.router.channels import WorkerChannels
from stateferry.router.client_stream import ClientStream, Emit
from stateferry.router.echo import PromptEcho
from stateferry.router.last_turns import LastTurn, LastTurns
from stateferry.router.loss import LossBoard
from stateferry.router.observer import RouterObserver
from stateferry.router.placement import Need
from stateferry.router.second_chances import FailoverLimits, SecondChances
from stateferry.router.text import OutputText, TextRules, Tokenizer

log = logging.getLogger(__name__)

FIRST_EPOCH = 1


@dataclass(frozen=True, slots=True)
class Job:
    """One choice of a validated request, and what only the router cares about. Times are monotonic
    seconds. ``echo_text`` is the prompt's text where it has to be sent back."""

    request: GenerationRequest
    tenant: str
    text: TextRules
    arrived_s: float
    deadline_s: float
    echo_text: str | None = None
    choice: int = 0

    def of_choice(self, choice: int) -> Job:
        """The same for another choice; the prompt goes back with choice 0 alone."""
        if choice == 0:
            return self
        sampling = self.request.sampling
        sampling = replace(sampling, seed=choice_seed(sampling.seed, choice))
        request = replace(self.request, sampling=sampling, prompt_logprobs=None)
        return replace(self, request=request, echo_text=None, choice=choice)


@dataclass(frozen=True, slots=True)
class Workers:
    """How requests reach workers, and learn of their loss."""

    admission: Admission
    channels: WorkerChannels
    losses: LossBoard


@dataclass(frozen=True, slots=True)
class TicketOffice:
    """Mints tickets of one cluster."""

    signer: TicketSigner
    lifetime_s: float
    clock: Clock

    def mint(self, job: Job, request: GenerationRequest, epoch: int, seats: Seats) -> bytes:
        """A signed, single-use permission for one attempt on exactly these workers."""
        prefill, decode = seats.placement.prefill, seats.placement.decode
        ticket = Ticket(
            request_id=request.request_id,
            epoch=epoch,
            tenant=job.tenant,
            prefill=prefill.key,
            decode=None if decode is None else decode.key,
            transfer_address=None if decode is None else decode.transfer_address,
            prompt_len=request.prompt_len,
            max_tokens=request.stop.max_tokens,
            expires_at_s=self.clock.wall_s() + self.lifetime_s,
            cache_salt=request.cache_salt,
            priority=request.priority,
            session=request.session,
            num_output_ids=request.num_output_ids,
        )
        return self.signer.sign(ticket)


@dataclass(slots=True)
class _Life:
    """One request from its first attempt to its last."""

    job: Job
    emit: Emit
    stream: ClientStream | None = None
    echo: PromptEcho | None = None
    queue_s: float = 0.0
    attempt: Attempt | None = None
    # Of the attempt that computed the prompt.
    figures: WorkerFigures | None = None
    last_prefill: WorkerKey | None = None
    # Whether a decode worker may be asked for the prompt before a prefill worker has room.
    asks_decode: bool = True

    @property
    def request(self) -> GenerationRequest:
        """What the next attempt runs: the client's request, behind what the client has of it."""
        sent = () if self.stream is None else tuple(self.stream.token_ids)
        return self.job.request.continued(sent)

    @property
    def ended(self) -> FinishReason | None:
        """Whether all tokens had come before the last attempt failed."""
        sent = [] if self.stream is None else self.stream.token_ids
        return self.job.request.stop.check(sent[-1], len(sent)) if sent else None


class Generation:
    """Runs requests; one instance serves all of them."""

    def __init__(
        self,
        workers: Workers,
        office: TicketOffice,
        tokenizer: Tokenizer,
        vocab_size: int,
        clock: Clock,
        observer: RouterObserver,
        failover: FailoverLimits,
    ) -> None:
        self._workers = workers
        self._office = office
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._clock = clock
        self._observer = observer
        self._failover = failover
        self._last_turns = LastTurns()

    async def run(self, job: Job, emit: Emit) -> Completion:
        """Stream one request through ``emit`` and say how it ended. Raises StateferryError."""
        chances = SecondChances(self._failover, self._clock, job.deadline_s)
        life = _Life(job, emit)
        while True:
            seats = await chances.seats(partial(self._take_seats, life, chances))
            try:
                return await self._attempt(life, chances, seats)
            except Declined:
                # It costs a round trip, and is not tried again.
                life.asks_decode = False
                continue
            except StateferryError as error:
                suspects = frozenset() if life.attempt is None else life.attempt.suspects
                if not chances.take(error, frozenset(suspects)):
                    raise
                self._observer.failed_over(type(error).__name__)
                log.warning("attempt %d failed, another follows: %s", chances.num_failed, error)
            finally:
                seats.release()
            if life.stream is not None:
                life.stream.stall()
            life.last_prefill = seats.placement.prefill.key
            await chances.pause()

    async def _take_seats(self, life: _Life, chances: SecondChances) -> Seats:
        request = life.request
        last = self._last_turns.of(request.cache_salt, request.session, request.prompt_ids)
        need = Need(
            prompt_len=request.prompt_len,
            total_tokens=request.total_tokens,
            needs_decode=request.stop.max_tokens - request.num_output_ids > 1,
            last_decode=last.decode,
            # It has what the prompt left, and needs to run only what was sent since.
            last_prefill=life.last_prefill or last.prefill,
            priority=request.priority,
            # What decode knows no prompt of, it could not run again.
            preemptible=request.prompt_logprobs is None,
            asks_decode=life.asks_decode and request.prompt_logprobs is None,
            avoided=chances.avoided,
        )
        return await self._workers.admission.take_seats(need, life.job.deadline_s)

    async def _attempt(self, life: _Life, chances: SecondChances, seats: Seats) -> Completion:
        job, request = life.job, life.request
        if life.stream is None:
            life.queue_s = self._clock.monotonic_s() - job.arrived_s
            self._observer.queued(life.queue_s)
            text = OutputText(self._tokenizer, request.prompt_ids, job.text)
            life.stream = ClientStream(
                text, life.emit, job.arrived_s, self._clock, self._observer, job.choice
            )
            life.echo = await self._echo(job, life.emit)
        elif not life.stream.token_ids:
            # It was declined, or failed before its first token: all of that was waiting.
            life.queue_s = self._clock.monotonic_s() - job.arrived_s
        stream, epoch = life.stream, FIRST_EPOCH + chances.num_failed
        reason = life.ended
        if reason is None:
            order = AttemptOrder(
                request=request,
                vocab_size=self._vocab_size,
                epoch=epoch,
                ticket=self._office.mint(job, request, epoch, seats),
                seats=seats,
            )
            echo = None if stream.token_ids else life.echo
            life.attempt = Attempt(
                order, stream, self._workers.channels, self._workers.losses, echo
            )
            try:
                reason = await life.attempt.run()
            finally:
                # Who cuts an answer off may go on from what there was of it.
                self._note_turn(request, life.attempt, seats)
                if life.figures is None and life.attempt.token_ids:
                    life.figures = life.attempt.figures
        await stream.finish()
        return self._completion(life, reason, seats, epoch)

    def _note_turn(self, request: GenerationRequest, attempt: Attempt, seats: Seats) -> None:
        """Whoever decodes consumes all but the last token."""
        decode, token_ids = seats.placement.decode, attempt.token_ids
        has_decoded = decode is not None and len(token_ids) > 1
        if decode is not None and has_decoded:
            consumed = (*request.prompt_ids, *token_ids[:-1])
            self._last_turns.note(request.cache_salt, consumed, decode.key)
        if request.session and token_ids:
            turn = LastTurn(
                None if attempt.figures.ran_prompt_at_decode else seats.placement.prefill.key,
                decode.key if decode is not None and has_decoded else None,
            )
            self._last_turns.note_session(request.cache_salt, request.session, turn)

    async def _echo(self, job: Job, emit: Emit) -> PromptEcho | None:
        """Sends the prompt back at once where it need not be scored."""
        if job.echo_text is None:
            return None
        echo = PromptEcho(job.request.prompt_ids, job.echo_text, emit)
        if job.request.prompt_logprobs is None:
            await echo.send_plain()
        return echo

    def _completion(
        self, life: _Life, reason: FinishReason, seats: Seats, epoch: int
    ) -> Completion:
        job, stream, figures = life.job, life.stream, life.figures or WorkerFigures()
        assert stream is not None
        decode = seats.placement.decode
        self._observer.tokens(job.request.prompt_len, stream.num_tokens)
        if figures.transport:
            self._observer.handoff(figures.transport, figures.handoff_bytes, figures.handoff_s)
        return Completion(
            request_id=job.request.request_id,
            finish_reason=FinishReason.STOP if stream.matched_stop else reason,
            matched_stop=stream.matched_stop or "",
            seed=job.request.sampling.seed,
            usage=Usage(
                prompt_tokens=job.request.prompt_len,
                completion_tokens=stream.num_tokens,
                prefix_tokens=figures.prefix_tokens,
                resumed_tokens=figures.resumed_tokens,
            ),
            timings=Timings(
                queue_s=life.queue_s,
                prefill_queue_s=figures.prefill_queue_s,
                prefill_s=figures.prefill_s,
                ttft_s=stream.ttft_s,
                handoff_s=figures.handoff_s,
                handoff_bytes=figures.handoff_bytes,
                transport=figures.transport,
                decode_s=stream.decode_s,
                total_s=stream.total_s,
            ),
            prefill_worker=str(
                decode.key
                if decode is not None and figures.ran_prompt_at_decode
                else seats.placement.prefill.key
            ),
            decode_worker=str(decode.key) if decode is not None and stream.num_tokens > 1 else "",
            choice=job.choice,
            attempts=epoch,
        )
