"""The life of one request inside the router: wait for workers, sign a ticket, run an attempt."""

from __future__ import annotations

from dataclasses import dataclass, replace

from stateferry.api.answer_codec import Completion, Timings, Usage
from stateferry.core.clock import Clock
from stateferry.core.request import GenerationRequest
from stateferry.core.sampling import FinishReason, choice_seed
from stateferry.core.ticket import Ticket, TicketSigner
from stateferry.router.admission import Admission, Seats
from stateferry.router.attempt import Attempt, AttemptOrder, WorkerFigures
from stateferry.router.channels import WorkerChannels
from stateferry.router.client_stream import ClientStream, Emit
from stateferry.router.echo import PromptEcho
from stateferry.router.last_turns import LastTurns
from stateferry.router.loss import LossBoard
from stateferry.router.observer import RouterObserver
from stateferry.router.placement import Need
from stateferry.router.text import OutputText, TextRules, Tokenizer

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

    def mint(self, job: Job, epoch: int, seats: Seats) -> bytes:
        """A signed, single-use permission for one attempt on exactly these workers."""
        prefill, decode = seats.placement.prefill, seats.placement.decode
        ticket = Ticket(
            request_id=job.request.request_id,
            epoch=epoch,
            tenant=job.tenant,
            prefill=prefill.key,
            decode=None if decode is None else decode.key,
            transfer_address=None if decode is None else decode.transfer_address,
            prompt_len=job.request.prompt_len,
            max_tokens=job.request.stop.max_tokens,
            expires_at_s=self.clock.wall_s() + self.lifetime_s,
            cache_salt=job.request.cache_salt,
        )
        return self.signer.sign(ticket)


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
    ) -> None:
        self._workers = workers
        self._office = office
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._clock = clock
        self._observer = observer
        self._last_turns = LastTurns()

    async def run(self, job: Job, emit: Emit) -> Completion:
        """Stream one request through ``emit`` and say how it ended. Raises StateferryError."""
        request = job.request
        need = Need(
            prompt_len=request.prompt_len,
            total_tokens=request.prompt_len + request.stop.max_tokens,
            needs_decode=request.stop.max_tokens > 1,
            last_decode=self._last_turns.worker_of(request.cache_salt, request.prompt_ids),
        )
        seats = await self._workers.admission.take_seats(need, job.deadline_s)
        try:
            queue_s = self._clock.monotonic_s() - job.arrived_s
            self._observer.queued(queue_s)
            text = OutputText(self._tokenizer, request.prompt_ids, job.text)
            stream = ClientStream(
                text, emit, job.arrived_s, self._clock, self._observer, job.choice
            )
            echo = await self._echo(job, emit)
            order = AttemptOrder(
                request=request,
                vocab_size=self._vocab_size,
                epoch=FIRST_EPOCH,
                ticket=self._office.mint(job, FIRST_EPOCH, seats),
                seats=seats,
            )
            attempt = Attempt(order, stream, self._workers.channels, self._workers.losses, echo)
            try:
                reason = await attempt.run()
            finally:
                # Who cuts an answer off may go on from what there was of it.
                self._note_turn(request, attempt.token_ids, seats)
            await stream.finish()
            return self._completion(job, stream, reason, attempt.figures, seats, queue_s)
        finally:
            seats.release()

    def _note_turn(self, request: GenerationRequest, token_ids: list[int], seats: Seats) -> None:
        """Whoever decodes consumes all but the last token."""
        decode = seats.placement.decode
        if decode is not None and len(token_ids) > 1:
            consumed = (*request.prompt_ids, *token_ids[:-1])
            self._last_turns.note(request.cache_salt, consumed, decode.key)

    async def _echo(self, job: Job, emit: Emit) -> PromptEcho | None:
        """Sends the prompt back at once where it need not be scored."""
        if job.echo_text is None:
            return None
        echo = PromptEcho(job.request.prompt_ids, job.echo_text, emit)
        if job.request.prompt_logprobs is None:
            await echo.send_plain()
        return echo

    def _completion(
        self,
        job: Job,
        stream: ClientStream,
        reason: FinishReason,
        figures: WorkerFigures,
        seats: Seats,
        queue_s: float,
    ) -> Completion:
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
                queue_s=queue_s,
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
        )
