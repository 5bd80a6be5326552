"""In-process stand-ins for workers, and a real router on loopback in front of them."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import tokenizers
from tokenizers import decoders, pre_tokenizers

from stateferry.api.server import RunningServer, open_channel, start_server
from stateferry.config import load_config
from stateferry.core.clock import SystemClock
from stateferry.core.cluster_key import ClusterKey
from stateferry.core.fingerprint import PROTOCOL_VERSION, Fingerprint
from stateferry.core.ids import Role, WorkerKey
from stateferry.core.ticket import Ticket, TicketSigner
from stateferry.core.worker import PoolCount, PoolSizes, WorkerDescription, WorkerLoad
from stateferry.guided.compiler import GuideCompiler
from stateferry.router.guides import GuideGate
from stateferry.router.main import Router, build_router
from stateferry.router.model_info import ModelInfo
from stateferry.router.observer import NoObserver
from stateferry.router.text import Tokenizer
from stateferry.v1 import inference_pb2 as pb
from stateferry.v1 import inference_pb2_grpc, worker_pb2, worker_pb2_grpc

KEY = "0123456789abcdef"
CLUSTER_KEY = ClusterKey(KEY.encode())
EOS = 256
VOCAB_SIZE = 300
MODEL = ModelInfo("tiny", VOCAB_SIZE, 4096, 32, frozenset({EOS}), None, "float32")
FINGERPRINT = Fingerprint(PROTOCOL_VERSION, "tiny", "w", "l", 32, "float32", "cpu")
STOPPED = worker_pb2.WorkerFinish(reason=worker_pb2.WORKER_FINISH_REASON_STOP)
FULL = worker_pb2.WorkerFinish(reason=worker_pb2.WORKER_FINISH_REASON_LENGTH)


class FakeClock:
    """Time that moves only when told to."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic_s(self) -> float:
        return self.now_s

    def wall_s(self) -> float:
        return self.now_s


def _byte_chars() -> list[str]:
    """How byte-level tokenizers write each byte: printable ones as they are, the rest above 255."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(b) if b in printable else chr(next(others)) for b in range(256)]


def byte_tokenizer(merges: Sequence[tuple[str, str]] = ()) -> Tokenizer:
    """Byte-level BPE whose first 256 ids are single bytes, and 256 the end of sequence."""
    vocab = {char: byte for byte, char in enumerate(_byte_chars())}
    vocab["<eos>"] = EOS
    for left, right in merges:
        vocab[left + right] = len(vocab)
    raw = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=list(merges)))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(["<eos>"])
    return Tokenizer(raw)


# Removed when the tests end; a guide may read its file at any time before.
_TOKENIZERS = tempfile.TemporaryDirectory(prefix="stateferry-guides-")


def guide_gate(tokenizer: Tokenizer) -> GuideGate:
    """Guides for ``tokenizer``; llguidance reads it from a file."""
    folder = Path(tempfile.mkdtemp(dir=_TOKENIZERS.name))
    tokenizer._tokenizer.save(str(folder / "tokenizer.json"))
    return GuideGate(GuideCompiler(folder / "tokenizer.json", VOCAB_SIZE, frozenset({EOS})))


def description(
    role: Role,
    worker_id: str = "",
    *,
    incarnation: int = 1,
    address: str = "127.0.0.1:1",
    capacity: int = 8,
    max_context_tokens: int = 4096,
    fingerprint: Fingerprint = FINGERPRINT,
    kv_pages: int = 0,
    preempts: bool = False,
) -> WorkerDescription:
    """``kv_pages`` of 16 tokens; 0: a model without attention."""
    return WorkerDescription(
        key=WorkerKey(worker_id or f"{role.value}-0", incarnation),
        role=role,
        grpc_address=address,
        transfer_address="ucx://peer:1" if role is Role.DECODE else None,
        metrics_address="",
        fingerprint=fingerprint,
        capacity_requests=capacity,
        max_context_tokens=max_context_tokens,
        vocab_size=VOCAB_SIZE,
        kernels="torch",
        pools=PoolSizes(
            capacity, 1 + 2 * capacity, capacity, kv_pages, 16, 9, 9, 9 * (kv_pages > 0)
        ),
        preempts=preempts,
    )


def load(sequence: int, active: int = 0, queued_tokens: int = 0) -> WorkerLoad:
    pool, no_pages = PoolCount(1, 2), PoolCount(0, 0)
    return WorkerLoad(sequence, active, 0, queued_tokens, pool, pool, no_pages)


def out(token_id: int) -> worker_pb2.OutputToken:
    return worker_pb2.OutputToken(token_id=token_id)


def first(token_id: int, finish: worker_pb2.WorkerFinish | None = None) -> worker_pb2.PrefillEvent:
    return worker_pb2.PrefillEvent(
        first_token=worker_pb2.FirstToken(
            token=out(token_id), finish=finish, queue_s=0.25, prefill_s=0.5, prefix_tokens=2
        )
    )


def handed_off() -> worker_pb2.PrefillEvent:
    return worker_pb2.PrefillEvent(
        handed_off=worker_pb2.HandedOff(size_bytes=1234, duration_s=0.125, transport="ucx")
    )


def reserved() -> worker_pb2.DecodeEvent:
    return worker_pb2.DecodeEvent(reserved=worker_pb2.Reserved())


def runs_prompt() -> worker_pb2.DecodeEvent:
    return worker_pb2.DecodeEvent(reserved=worker_pb2.Reserved(runs_prompt=True))


def first_here(
    token_id: int, finish: worker_pb2.WorkerFinish | None = None
) -> worker_pb2.DecodeEvent:
    """Token 0, of a prompt that a decode worker runs."""
    return worker_pb2.DecodeEvent(first_token=first(token_id, finish).first_token)


def tokens(index: int, ids: Sequence[int]) -> worker_pb2.DecodeEvent:
    return worker_pb2.DecodeEvent(
        tokens=worker_pb2.Tokens(index=index, tokens=[out(i) for i in ids])
    )


def finished(finish: worker_pb2.WorkerFinish = FULL) -> worker_pb2.DecodeEvent:
    return worker_pb2.DecodeEvent(finished=finish)


Script = Callable[["FakeWorker", Any, Ticket], AsyncIterator[Any]]


@dataclass
class FakeWorker:
    """Follows a script per call and notes what became of the call."""

    role: Role
    script: Script
    tickets: list[Ticket] = field(default_factory=list)
    requests: list[Any] = field(default_factory=list)
    num_active: int = 0
    num_cancelled: int = 0
    num_sent: int = 0
    context: Any = None
    server: RunningServer | None = None
    # Set by a fake prefill when its "push" is done; the fake decode waits for it.
    sealed: asyncio.Event = field(default_factory=asyncio.Event)

    async def handle(self, request: Any, context: Any) -> AsyncIterator[Any]:
        ticket = TicketSigner(CLUSTER_KEY).open(request.ticket)
        self.tickets.append(ticket)
        self.requests.append(request)
        self.context = context
        self.num_active += 1
        try:
            async for event in self.script(self, request, ticket):
                yield event
        except (asyncio.CancelledError, GeneratorExit):
            self.num_cancelled += 1
            raise
        finally:
            self.num_active -= 1

    def register(self, server: grpc.aio.Server) -> list[str]:
        if self.role is Role.PREFILL:
            prefill = type("P", (worker_pb2_grpc.PrefillServicer,), {"Run": self._handler()})
            worker_pb2_grpc.add_PrefillServicer_to_server(prefill(), server)
            return ["stateferry.v1.Prefill"]
        decode = type("D", (worker_pb2_grpc.DecodeServicer,), {"Generate": self._handler()})
        worker_pb2_grpc.add_DecodeServicer_to_server(decode(), server)
        return ["stateferry.v1.Decode"]

    async def kill(self) -> None:
        assert self.server is not None
        await self.server.stop(0)

    def _handler(self) -> Any:
        async def handler(_: Any, request: Any, context: Any) -> AsyncIterator[Any]:
            async for event in self.handle(request, context):
                yield event

        return handler


class FakeCluster:
    """A router with one fake worker of each role, joined without a membership stream."""

    def __init__(self, prefill: Script, decode: Script) -> None:
        self.prefill = FakeWorker(Role.PREFILL, prefill)
        self.decode = FakeWorker(Role.DECODE, decode)
        # Both sides share the event that stands for the transfer.
        self.decode.sealed = self.prefill.sealed

    async def call(self, request: pb.GenerateRequest, **options: Any) -> list[Any]:
        return [event async for event in self.stub.Generate(request, **options)]

    async def until(self, condition: Callable[[], bool], within_s: float = 1.0) -> None:
        """Fails when ``condition`` has not come true in time."""
        async with asyncio.timeout(within_s):
            while not condition():
                await asyncio.sleep(0.005)

    async def assert_clean(self, within_s: float = 1.0) -> None:
        """Nothing of any request is left anywhere."""
        await self.until(lambda: self.is_clean, within_s)

    @property
    def is_clean(self) -> bool:
        router = self.router
        dispatched = sum(v.dispatched_requests for r in Role for v in router.registry.views(r))
        return (
            router.admission.num_in_flight == 0
            and router.admission.num_waiting == 0
            and dispatched == 0
            and router.channels.num_users == 0
            and self.prefill.num_active == 0
            and self.decode.num_active == 0
        )


@contextlib.asynccontextmanager
async def fake_cluster(
    prefill: Script, decode: Script, *, join: bool = True, capacity: int = 8, **overrides: Any
) -> AsyncIterator[FakeCluster]:
    """``overrides`` are router settings."""
    cluster = FakeCluster(prefill, decode)
    settings = {"heartbeat_interval_s": 60.0, **overrides}
    config = load_config(
        overrides={"cluster.key": KEY, **{f"router.{k}": v for k, v in settings.items()}},
        environ={},
    )
    tokenizer = byte_tokenizer()
    router: Router = build_router(
        config, MODEL, tokenizer, guide_gate(tokenizer), SystemClock(), NoObserver()
    )
    cluster.router = router
    cluster.server = await start_server("127.0.0.1", 0, router.register)
    watching = asyncio.create_task(router.watch.run(router.admission))
    for worker in (cluster.prefill, cluster.decode):
        worker.server = await start_server("127.0.0.1", 0, worker.register)
    cluster.registrations = {}
    if join:
        for worker in (cluster.prefill, cluster.decode):
            who = description(worker.role, address=worker.server.address, capacity=capacity)
            cluster.registrations[worker.role] = router.registry.join(who)
    try:
        async with open_channel(cluster.server.address) as channel:
            cluster.channel = channel
            cluster.stub = inference_pb2_grpc.InferenceStub(channel)
            yield cluster
    finally:
        watching.cancel()
        await cluster.server.stop(0)
        for worker in (cluster.prefill, cluster.decode):
            await worker.server.stop(0)
        await router.channels.close()
        tokenizer.close()
