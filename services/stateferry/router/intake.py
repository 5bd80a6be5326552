"""What both doors, gRPC and HTTP, do with a checked request before it may wait for workers."""

from __future__ import annotations

import math
from dataclasses import dataclass

from stateferry.api import inference_codec as codec
from stateferry.core.clock import Clock
from stateferry.router.admission import Admission
from stateferry.router.generate import Generation, Job
from stateferry.router.guides import GuideGate
from stateferry.router.membership import WorkerRegistry
from stateferry.router.model_info import ModelInfo
from stateferry.router.observer import RouterObserver
from stateferry.router.text import TextRules, Tokenizer


@dataclass(frozen=True, slots=True)
class Door:
    """What a call needs before it may wait for workers."""

    model: ModelInfo
    limits: codec.RequestLimits
    tokenizer: Tokenizer
    guides: GuideGate
    admission: Admission


@dataclass(frozen=True, slots=True)
class Backend:
    """What another door than gRPC's needs of a router."""

    door: Door
    generation: Generation
    registry: WorkerRegistry
    clock: Clock
    observer: RouterObserver


async def make_job(
    door: Door, client: codec.ClientRequest, arrived_s: float, remaining_s: float | None
) -> Job:
    """Tokenise the prompt and check what only that can tell. ``arrived_s`` is monotonic;
    ``remaining_s`` None: no deadline. Raises InvalidRequest naming the field."""
    prompt, answer = client.prompt, client.answer
    ids = await door.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    request = codec.complete_request(client, ids, door.limits)
    await door.guides.check(client.sampling.guide)
    return Job(
        request=request,
        tenant=client.tenant,
        text=TextRules(
            stop_strings=client.stop.strings,
            stop_token_ids=request.stop.stop_token_ids,
            min_tokens=request.stop.min_tokens,
            include_stop=answer.include_stop,
            skip_special_tokens=answer.skip_special_tokens,
        ),
        arrived_s=arrived_s,
        deadline_s=math.inf if remaining_s is None else arrived_s + remaining_s,
        echo_text=_echo_text(door, prompt, answer) if answer.echo else None,
    )


def _echo_text(door: Door, prompt: str | tuple[int, ...], answer: codec.AnswerOptions) -> str:
    if isinstance(prompt, str):
        return prompt
    return door.tokenizer.decode(prompt, skip_special_tokens=answer.skip_special_tokens)
