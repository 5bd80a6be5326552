"""A small asyncio client of the router. Anything it does a bare gRPC stub can do as well.

::

    async with Client("127.0.0.1:50051") as client:
        async for event in client.generate("The sea is", GenerateOptions(max_tokens=32)):
            if isinstance(event, Delta):
                print(event.text, end="", flush=True)

Failures are ``grpc.aio.AioRpcError``; its code is what docs/ARCHITECTURE.md lists.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import grpc

from stateferry.api.answer_codec import Timings
from stateferry.api.server import open_channel
from stateferry.v1 import inference_pb2, inference_pb2_grpc, membership_pb2, membership_pb2_grpc

# Of one place: token ids and natural logarithms of their probabilities, likeliest first.
TopLogprobs = tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class GenerateOptions:
    """How to continue a prompt, as proto/stateferry/v1/inference.proto says in full. None leaves
    the choice to the router. At most one of ``json_schema``, ``json_object``, ``regex``,
    ``choices`` and ``grammar`` may be set: what the output has to look like.
    """

    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    n: int | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    include_stop: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool | None = None
    logprobs: int | None = None
    echo: bool = False
    prompt_logprobs: int | None = None
    json_schema: str | None = None
    json_object: bool = False
    regex: str | None = None
    choices: Sequence[str] = ()
    grammar: str | None = None
    model: str = ""
    tenant: str = ""
    cache_salt: str = ""
    snapshot_hints: Sequence[int] = ()
    priority: int = 0
    session_id: str = ""
    request_id: str = ""
    timeout_s: float | None = None


@dataclass(frozen=True, slots=True)
class Delta:
    """Newly generated tokens of one choice. ``index`` counts generated tokens from 0; ``text`` may
    trail ids.

    When they were asked for, ``logprobs`` has one natural logarithm per id, and ``top_logprobs``
    (id, logarithm) of the likeliest tokens in its place.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    top_logprobs: tuple[TopLogprobs, ...] = ()
    choice: int = 0


@dataclass(frozen=True, slots=True)
class PromptPart:
    """With ``echo``: a part of the prompt, from token ``index`` on; all of its text in the first.

    Logarithms as in Delta, but none for the prompt's first token.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    top_logprobs: tuple[TopLogprobs, ...]


@dataclass(frozen=True, slots=True)
class Completion:
    """The end of a choice that went well. ``finish_reason`` is stop or length."""

    request_id: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    prefix_tokens: int
    resumed_tokens: int
    seed: int
    matched_stop: str
    prefill_worker: str
    decode_worker: str
    timings: Timings
    choice: int = 0
    attempts: int = 1

    @property
    def tokens_per_s(self) -> float:
        """Rate of the tokens after the first one; 0 when there is none."""
        later = self.completion_tokens - 1
        return later / self.timings.decode_s if later > 0 and self.timings.decode_s > 0 else 0.0


Event = Delta | PromptPart | Completion


class Client:
    """One channel to one router (``host:port``). Many streams may run at the same time."""

    def __init__(self, address: str) -> None:
        self._channel = open_channel(address)
        self._inference = inference_pb2_grpc.InferenceStub(self._channel)
        self._membership = membership_pb2_grpc.MembershipStub(self._channel)

    async def generate(
        self, prompt: str | Sequence[int], options: GenerateOptions | None = None
    ) -> AsyncGenerator[Event, None]:
        """Deltas in order, then one Completion; of each choice, if there are several. With echo,
        the prompt comes before the deltas of choice 0. Leaving the loop early cancels the request.
        """
        options = options or GenerateOptions()
        call = self._inference.Generate(_request(prompt, options), timeout=options.timeout_s)
        try:
            async for response in call:
                yield _event(response)
        finally:
            call.cancel()

    async def list_models(self) -> list[inference_pb2.Model]:
        """The models served."""
        reply = await self._inference.ListModels(inference_pb2.ListModelsRequest())
        return list(reply.models)

    async def list_workers(self) -> list[membership_pb2.WorkerStatus]:
        """Every worker that the router knows of, by role and id."""
        reply = await self._membership.ListWorkers(membership_pb2.ListWorkersRequest())
        return sorted(reply.workers, key=lambda w: (w.description.role, w.description.worker_id))

    async def close(self) -> None:
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()


def describe_error(error: grpc.aio.AioRpcError, address: str) -> str:
    """One line for people."""
    details = error.details() or "no details"
    if error.code() is grpc.StatusCode.UNAVAILABLE and "connect" in details.lower():
        return f"no router answers at {address}; start one with `stateferry serve`"
    return f"{error.code().name}: {details}"


def _request(
    prompt: str | Sequence[int], options: GenerateOptions
) -> inference_pb2.GenerateRequest:
    request = inference_pb2.GenerateRequest(
        request_id=options.request_id,
        model=options.model,
        tenant=options.tenant,
        sampling=inference_pb2.SamplingParams(
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            min_p=options.min_p,
            repetition_penalty=options.repetition_penalty,
            presence_penalty=options.presence_penalty,
            frequency_penalty=options.frequency_penalty,
            logit_bias=[
                inference_pb2.LogitBias(token_id=token_id, bias=bias)
                for token_id, bias in options.logit_bias.items()
            ],
            seed=options.seed,
        ),
        stop=inference_pb2.StopConditions(
            max_tokens=options.max_tokens,
            min_tokens=options.min_tokens,
            strings=options.stop,
            token_ids=options.stop_token_ids,
            ignore_eos=options.ignore_eos,
            include_stop=options.include_stop,
        ),
        logprobs=options.logprobs,
        n=options.n,
        echo=options.echo,
        prompt_logprobs=options.prompt_logprobs,
        skip_special_tokens=options.skip_special_tokens,
        cache_salt=options.cache_salt,
        snapshot_hints=options.snapshot_hints,
        priority=options.priority,
        session_id=options.session_id,
        guide=_guide(options),
    )
    if isinstance(prompt, str):
        request.text = prompt
    else:
        request.token_ids.ids.extend(prompt)
        request.token_ids.SetInParent()
    return request


def _guide(options: GenerateOptions) -> inference_pb2.Guide | None:
    """Raises ValueError when more than one form is wanted: the wire would carry only one."""
    forms: dict[str, Any] = {
        "json_schema": options.json_schema,
        "json_object": options.json_object or None,
        "regex": options.regex,
        "choices": inference_pb2.Choices(texts=options.choices) if options.choices else None,
        "grammar": options.grammar,
    }
    wanted = {name: form for name, form in forms.items() if form is not None}
    if len(wanted) > 1:
        raise ValueError(f"only one of {', '.join(wanted)} can be set")
    return inference_pb2.Guide(**wanted) if wanted else None


def _event(response: inference_pb2.GenerateResponse) -> Event:
    match response.WhichOneof("event"):
        case "delta":
            delta = response.delta
            return Delta(
                delta.index,
                delta.text,
                tuple(delta.token_ids),
                tuple(entry.logprob for entry in delta.logprobs),
                _top(delta.logprobs),
                delta.choice,
            )
        case "prompt":
            part = response.prompt
            return PromptPart(
                part.index,
                part.text,
                tuple(part.token_ids),
                tuple(entry.logprob for entry in part.logprobs),
                _top(part.logprobs),
            )
        case _:
            return _completion(response.completion)


def _top(logprobs: Iterable[inference_pb2.TokenLogprobs]) -> tuple[TopLogprobs, ...]:
    return tuple(tuple((t.token_id, t.logprob) for t in entry.top) for entry in logprobs)


def _completion(completion: inference_pb2.Completion) -> Completion:
    usage = completion.usage
    reason = inference_pb2.FinishReason.Name(completion.finish_reason)
    return Completion(
        request_id=completion.request_id,
        finish_reason=reason.removeprefix("FINISH_REASON_").lower(),
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        prefix_tokens=usage.prefix_tokens,
        resumed_tokens=usage.resumed_tokens,
        seed=completion.seed,
        matched_stop=completion.matched_stop,
        prefill_worker=completion.prefill_worker,
        decode_worker=completion.decode_worker,
        timings=Timings.of(completion.timings),
        choice=completion.choice,
        attempts=completion.attempts,
    )
