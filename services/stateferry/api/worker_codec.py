"""Between router and workers: core values to and from the internal messages.

Both ends are ours, so a malformed message is refused as InvalidRequest and is a bug somewhere; the
router has validated what clients sent long before.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from google.protobuf.message import DecodeError

from stateferry.api.sampling_codec import sampling_to_pb
from stateferry.core.cluster_key import ClusterKey
from stateferry.core.errors import InvalidRequest, TicketError
from stateferry.core.fingerprint import Fingerprint
from stateferry.core.ids import Role, WorkerKey
from stateferry.core.request import GenerationRequest
from stateferry.core.sampling import FinishReason, SampledToken, StopConditions, TokenLogprob
from stateferry.core.worker import PoolCount, PoolSizes, WorkerDescription, WorkerLoad
from stateferry.v1 import membership_pb2, worker_pb2

_JOIN = b"join"
_ROLES = {
    Role.PREFILL: membership_pb2.WORKER_ROLE_PREFILL,
    Role.DECODE: membership_pb2.WORKER_ROLE_DECODE,
}
_ROLES_BACK = {number: role for role, number in _ROLES.items()}
_REASONS = {
    FinishReason.STOP: worker_pb2.WORKER_FINISH_REASON_STOP,
    FinishReason.LENGTH: worker_pb2.WORKER_FINISH_REASON_LENGTH,
}
_REASONS_BACK = {number: reason for reason, number in _REASONS.items()}


def stop_to_pb(stop: StopConditions) -> worker_pb2.WorkerStop:
    return worker_pb2.WorkerStop(
        max_tokens=stop.max_tokens,
        min_tokens=stop.min_tokens,
        stop_token_ids=sorted(stop.stop_token_ids),
    )


def stop_from_pb(message: worker_pb2.WorkerStop) -> StopConditions:
    if message.max_tokens < 1:
        raise InvalidRequest("stop.max_tokens", "must be at least 1")
    return StopConditions(
        max_tokens=message.max_tokens,
        min_tokens=message.min_tokens,
        stop_token_ids=frozenset(message.stop_token_ids),
    )


def prefill_request_to_pb(ticket: bytes, request: GenerationRequest) -> worker_pb2.PrefillRequest:
    return worker_pb2.PrefillRequest(
        ticket=ticket,
        prompt_ids=request.prompt_ids,
        sampling=sampling_to_pb(request.sampling),
        stop=stop_to_pb(request.stop),
        prompt_logprobs=request.prompt_logprobs,
        snapshot_hints=request.snapshot_hints,
    )


def decode_request_to_pb(
    ticket: bytes, request: GenerationRequest, *, here_only: bool = False
) -> worker_pb2.DecodeRequest:
    return worker_pb2.DecodeRequest(
        ticket=ticket,
        sampling=sampling_to_pb(request.sampling),
        stop=stop_to_pb(request.stop),
        seen_prompt_ids=request.seen_prompt_ids,
        # A prompt that is to be scored runs where all of it is computed.
        prompt_ids=request.prompt_ids if request.prompt_logprobs is None else (),
        here_only=here_only,
    )


def token_to_pb(token: SampledToken) -> worker_pb2.OutputToken:
    return worker_pb2.OutputToken(
        token_id=token.token_id,
        logprob=token.logprob,
        top=[worker_pb2.TopLogprob(token_id=t.token_id, logprob=t.logprob) for t in token.top],
    )


def token_from_pb(message: worker_pb2.OutputToken) -> SampledToken:
    return SampledToken(
        token_id=message.token_id,
        logprob=message.logprob if message.HasField("logprob") else None,
        top=tuple(TokenLogprob(t.token_id, t.logprob) for t in message.top),
    )


def first_token_to_pb(
    token: SampledToken,
    finish: FinishReason | None,
    *,
    queue_s: float,
    prefill_s: float,
    resumed_tokens: int,
) -> worker_pb2.FirstToken:
    return worker_pb2.FirstToken(
        token=token_to_pb(token),
        finish=None if finish is None else finish_to_pb(finish),
        queue_s=queue_s,
        prefill_s=prefill_s,
        prefix_tokens=resumed_tokens,
        resumed_tokens=resumed_tokens,
    )


def prompt_tokens_event(index: int, tokens: Sequence[SampledToken]) -> worker_pb2.PrefillEvent:
    return worker_pb2.PrefillEvent(
        prompt_tokens=worker_pb2.PromptTokens(index=index, tokens=[token_to_pb(t) for t in tokens])
    )


def tokens_event(index: int, tokens: Sequence[SampledToken]) -> worker_pb2.DecodeEvent:
    return worker_pb2.DecodeEvent(
        tokens=worker_pb2.Tokens(index=index, tokens=[token_to_pb(t) for t in tokens])
    )


def finish_to_pb(reason: FinishReason) -> worker_pb2.WorkerFinish:
    return worker_pb2.WorkerFinish(reason=_REASONS[reason])


def finish_from_pb(message: worker_pb2.WorkerFinish) -> FinishReason:
    try:
        return _REASONS_BACK[message.reason]
    except KeyError:
        raise InvalidRequest("finish.reason", f"unknown value {message.reason}") from None


def description_to_pb(worker: WorkerDescription) -> membership_pb2.WorkerDescription:
    fingerprint = worker.fingerprint
    return membership_pb2.WorkerDescription(
        worker_id=worker.key.worker_id,
        incarnation=worker.key.incarnation,
        role=_ROLES[worker.role],
        grpc_address=worker.grpc_address,
        transfer_address=worker.transfer_address or "",
        metrics_address=worker.metrics_address,
        fingerprint=membership_pb2.WorkerFingerprint(
            protocol=fingerprint.protocol,
            model=fingerprint.model,
            weights=fingerprint.weights,
            layout=fingerprint.layout,
            grid_tokens=fingerprint.grid,
            dtype=fingerprint.dtype,
            numerics=fingerprint.numerics,
        ),
        capacity_requests=worker.capacity_requests,
        max_context_tokens=worker.max_context_tokens,
        kernels=worker.kernels,
        vocab_size=worker.vocab_size,
        pools=membership_pb2.PoolSizes(**dataclasses.asdict(worker.pools)),
        preempts=worker.preempts,
    )


def description_from_pb(message: membership_pb2.WorkerDescription) -> WorkerDescription:
    """Raises InvalidRequest where a worker left out what routing needs."""
    role = _ROLES_BACK.get(message.role)
    if role is None:
        raise InvalidRequest("description.role", f"unknown value {message.role}")
    for name in ("worker_id", "incarnation", "grpc_address", "capacity_requests"):
        if not getattr(message, name):
            raise InvalidRequest(f"description.{name}", "must be set")
    if role is Role.DECODE and not message.transfer_address:
        raise InvalidRequest("description.transfer_address", "must be set on a decode worker")
    fingerprint = message.fingerprint
    return WorkerDescription(
        key=WorkerKey(message.worker_id, message.incarnation),
        role=role,
        grpc_address=message.grpc_address,
        transfer_address=message.transfer_address or None,
        metrics_address=message.metrics_address,
        fingerprint=Fingerprint(
            protocol=fingerprint.protocol,
            model=fingerprint.model,
            weights=fingerprint.weights,
            layout=fingerprint.layout,
            grid=fingerprint.grid_tokens,
            dtype=fingerprint.dtype,
            numerics=fingerprint.numerics,
        ),
        capacity_requests=message.capacity_requests,
        max_context_tokens=message.max_context_tokens,
        vocab_size=message.vocab_size,
        kernels=message.kernels,
        pools=_pools_from_pb(message.pools),
        preempts=message.preempts,
    )


def _pools_from_pb(message: membership_pb2.PoolSizes) -> PoolSizes:
    if message.kv_page_bytes and not message.kv_page_tokens:
        raise InvalidRequest("description.pools.kv_page_tokens", "must be set")
    return PoolSizes(**{f.name: getattr(message, f.name) for f in dataclasses.fields(PoolSizes)})


def join_report(worker: WorkerDescription, key: ClusterKey) -> membership_pb2.WorkerReport:
    """The first report of a Join stream."""
    body = description_to_pb(worker).SerializeToString()
    signed = membership_pb2.SignedDescription(description=body, mac=key.mac(_JOIN, body))
    return membership_pb2.WorkerReport(description=signed)


def description_from_join(
    signed: membership_pb2.SignedDescription, key: ClusterKey
) -> WorkerDescription:
    """Raises TicketError when the sender does not hold the cluster key, InvalidRequest as above."""
    if not key.is_mac(signed.mac, _JOIN, signed.description):
        raise TicketError("the worker's cluster.key is not this router's")
    try:
        message = membership_pb2.WorkerDescription.FromString(signed.description)
    except DecodeError as error:
        raise InvalidRequest("description", "is no WorkerDescription") from error
    return description_from_pb(message)


def load_to_pb(load: WorkerLoad) -> membership_pb2.WorkerLoad:
    return membership_pb2.WorkerLoad(
        sequence=load.sequence,
        active_requests=load.active_requests,
        queued_requests=load.queued_requests,
        queued_tokens=load.queued_tokens,
        state_slots_free=load.state_slots.free,
        state_slots_total=load.state_slots.total,
        tail_pages_free=load.tail_pages.free,
        tail_pages_total=load.tail_pages.total,
        kv_pages_free=load.kv_pages.free,
        kv_pages_total=load.kv_pages.total,
    )


def load_from_pb(message: membership_pb2.WorkerLoad) -> WorkerLoad:
    return WorkerLoad(
        sequence=message.sequence,
        active_requests=message.active_requests,
        queued_requests=message.queued_requests,
        queued_tokens=message.queued_tokens,
        state_slots=PoolCount(message.state_slots_free, message.state_slots_total),
        tail_pages=PoolCount(message.tail_pages_free, message.tail_pages_total),
        kv_pages=PoolCount(message.kv_pages_free, message.kv_pages_total),
    )
