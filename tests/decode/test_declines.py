"""A decode worker that is asked to run a prompt or to decline."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from stateferry.api.worker_codec import decode_request_to_pb
from stateferry.core.clock import SystemClock
from stateferry.core.cluster_key import ClusterKey
from stateferry.core.ids import Role, WorkerKey
from stateferry.core.request import GenerationRequest
from stateferry.core.sampling import SamplingParams, StopConditions
from stateferry.core.ticket import Ticket, TicketDesk, TicketSigner
from stateferry.decode.servicer import DecodeServicer
from stateferry.worker.limits import ModelLimits
from support.scripted_runner import NullMeter

ME, PREFILL = WorkerKey("decode-0", 1), WorkerKey("prefill-0", 1)
KEY = ClusterKey(b"0123456789abcdef")


class Loop:
    """Notes who was admitted; nobody gets memory."""

    def __init__(self) -> None:
        self.admitted: list[tuple[str, int, int]] = []

    def admit(self, request_id: str, held_tokens: int, priority: int) -> None:
        self.admitted.append((request_id, held_tokens, priority))

    async def reserved(self, request_id: str) -> None:
        raise TimeoutError

    def abort(self, request_id: str) -> None:
        pass


class Steering:
    async def continuation(self, wanted: Any) -> Any:
        return wanted


@pytest.mark.parametrize("here_only", [True, False])
@pytest.mark.parametrize("scored", [True, False])
async def test_declines_without_taking_anything(here_only: bool, scored: bool) -> None:
    signer, loop, asked = TicketSigner(KEY), Loop(), []
    prompts = SimpleNamespace(begin=asked.append, abort=lambda _: None)
    servicer = DecodeServicer(
        TicketDesk(signer, Role.DECODE, ME, SystemClock()),
        loop,  # type: ignore[arg-type]
        prompts,  # type: ignore[arg-type]
        SimpleNamespace(cache=None, limits=ModelLimits(300, 4096)),  # type: ignore[arg-type]
        Steering(),  # type: ignore[arg-type]
        None,  # type: ignore[arg-type]
        NullMeter(),
        1.0,
    )
    request = GenerationRequest(
        "r",
        (1, 2, 3),
        SamplingParams(0.0, 0, 1.0, 0, None),
        StopConditions(4, 0, frozenset()),
        prompt_logprobs=0 if scored else None,
        priority=7,
    )
    expires_s = SystemClock().wall_s() + 30
    ticket = Ticket("r", 1, "", PREFILL, ME, "127.0.0.1:1", 3, 4, expires_s, priority=7)
    message = decode_request_to_pb(signer.sign(ticket), request, here_only=here_only)
    events = []
    call = servicer.Generate.__wrapped__(servicer, message, None)  # type: ignore[attr-defined]
    try:
        async for event in call:
            events.append(event)
    except TimeoutError:
        assert not here_only, "it waited for memory"
    assert len(asked) == (not scored), "a prompt that it was not given"
    if here_only:
        [event] = events
        assert event.reserved.declined and not event.reserved.runs_prompt
        assert not loop.admitted
    else:
        assert not events and loop.admitted == [(ticket.attempt_id, 7, 7)]
