"""A small asyncio client of the router. Anything it does a bare gRPC stub can do as well.

::

    async with Client("127.0.0.1:50051") as client:
        async for event in client.generate("The sea is", GenerateOptions(max_tokens=32)):
            if isinstance(event, Delta):
                print(event.text, end="", flush=True)

Failures are ``grpc.aio.AioRpcError``; its code is what docs/ARCHITECTURE.md lists.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import grpc

from stateferry.api.server import open_channel
from stateferry.v1 import inference_pb2, inference_pb2_grpc, membership_pb2, membership_pb2_grpc


@dataclass(frozen=True, slots=True)
class GenerateOptions:
    """How to continue a prompt. None leaves the choice to the router."""

    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    model: str = ""
    tenant: str = ""
    request_id: str = ""
    timeout_s: float | None = None


@dataclass(frozen=True, slots=True)
class Delta:
    """Newly generated tokens. ``index`` counts generated tokens from 0; ``text`` may trail ids.

    ``logprobs`` has one natural logarithm per id when they were asked for.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Timings:
    """Where the time went, in seconds; ``handoff_bytes`` crossed ``transport``."""

    queue_s: float
    prefill_queue_s: float
    prefill_s: float
    ttft_s: float
    handoff_s: float
    handoff_bytes: int
    transport: str
    decode_s: float
    total_s: float


@dataclass(frozen=True, slots=True)
class Completion:
    """The end of a stream that went well. ``finish_reason`` is stop or length."""

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

    @property
    def tokens_per_s(self) -> float:
        """Rate of the tokens after the first one; 0 when there is none."""
        later = self.completion_tokens - 1
        return later / self.timings.decode_s if later > 0 and self.timings.decode_s > 0 else 0.0


class Client:
    """One channel to one router (``host:port``). Many streams may run at the same time."""

    def __init__(self, address: str) -> None:
        self._channel = open_channel(address)
        self._inference = inference_pb2_grpc.InferenceStub(self._channel)
        self._membership = membership_pb2_grpc.MembershipStub(self._channel)

    async def generate(
        self, prompt: str | Sequence[int], options: GenerateOptions | None = None
    ) -> AsyncGenerator[Delta | Completion, None]:
        """Deltas in order, then one Completion. Leaving the loop early cancels the request."""
        options = options or GenerateOptions()
        call = self._inference.Generate(_request(prompt, options), timeout=options.timeout_s)
        try:
            async for response in call:
                if response.HasField("delta"):
                    yield _delta(response.delta)
                else:
                    yield _completion(response.completion)
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
            seed=options.seed,
        ),
        stop=inference_pb2.StopConditions(
            max_tokens=options.max_tokens,
            min_tokens=options.min_tokens,
            strings=options.stop,
            token_ids=options.stop_token_ids,
            ignore_eos=options.ignore_eos,
        ),
        logprobs=options.logprobs,
    )
    if isinstance(prompt, str):
        request.text = prompt
    else:
        request.token_ids.ids.extend(prompt)
        request.token_ids.SetInParent()
    return request


def _delta(delta: inference_pb2.Delta) -> Delta:
    logprobs = tuple(entry.logprob for entry in delta.logprobs)
    return Delta(delta.index, delta.text, tuple(delta.token_ids), logprobs)


def _completion(completion: inference_pb2.Completion) -> Completion:
    usage, spent = completion.usage, completion.timings
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
        timings=Timings(
            queue_s=spent.queue_s,
            prefill_queue_s=spent.prefill_queue_s,
            prefill_s=spent.prefill_s,
            ttft_s=spent.ttft_s,
            handoff_s=spent.handoff_s,
            handoff_bytes=spent.handoff_bytes,
            transport=spent.transport,
            decode_s=spent.decode_s,
            total_s=spent.total_s,
        ),
    )
