"""Pages of keys and values cross while later slices of the prompt are still to be computed."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from stateferry.cache.state_cache import StateCache
from stateferry.core.clock import SystemClock
from stateferry.core.fingerprint import PROTOCOL_VERSION, Fingerprint
from stateferry.core.ids import WorkerKey
from stateferry.core.request import GenerationRequest
from stateferry.core.sampling import SamplingParams, StopConditions
from stateferry.decode.intake import PageIntake, take_in
from stateferry.prefill.page_stream import PageStream
from stateferry.transfer.inproc import InprocNetwork, InprocTransport
from stateferry.transfer.limits import TransferLimits
from stateferry.transfer.receiver import HandoffReceiver
from stateferry.transfer.sender import HandoffSender
from stateferry_kernels.kv_layer import KvGeometry
from support.running_prefill import running_prefill
from support.scripted_runner import ScriptedRunner
from support.small_cache import GRID, KV, NO_KV, small_cache

PROMPT_LEN = 3 * GRID + 5
FINGERPRINT = Fingerprint(PROTOCOL_VERSION, "tiny", "w", "l", GRID, "float32", "cpu")
PREFILL, DECODE = WorkerKey("prefill-0", 1), WorkerKey("decode-0", 1)


def fill(cache: StateCache, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    lease = cache.lease("r")
    for view in cache.pools.kv.page_views(lease, 0, PROMPT_LEN // GRID):
        for piece in view.pieces:
            piece.copy_(torch.randn(piece.shape, generator=generator))


def state_bytes(cache: StateCache) -> list[torch.Tensor]:
    views = cache.pools.sequence_views(cache.lease("r"))
    return [piece.clone().view(torch.uint8) for view in views for piece in view.pieces]


@pytest.mark.parametrize("kv", [KV, NO_KV], ids=["hybrid", "no attention"])
async def test_pages_cross_before_the_last_slice_runs(kv: KvGeometry) -> None:
    cache, runner, network = small_cache(kv=kv), ScriptedRunner(), InprocNetwork()
    limits, clock = TransferLimits(), SystemClock()
    receiver = HandoffReceiver(InprocTransport(network), DECODE, FINGERPRINT, limits, clock)
    sender = HandoffSender(InprocTransport(network), PREFILL, FINGERPRINT, limits, clock)
    target = small_cache(max_sequences=3, kv=kv)
    target.pools.poison()
    assert target.reserve("somebody else", 2 * GRID) and target.reserve("r", PROMPT_LEN + 9)
    pages = PageIntake("r", PROMPT_LEN, target)

    async def on_part(received: Any) -> None:
        pages.take_in(received)

    expectation = receiver.expect("r", 1, PREFILL, 1 << 30, on_part)
    ticket: Any = SimpleNamespace(
        attempt_id="r",
        epoch=1,
        decode=DECODE,
        transfer_address=await receiver.start(),
        prompt_len=PROMPT_LEN,
    )
    steps, crossed = 0, []

    def before() -> None:
        """On the engine's thread, ahead of each of the four slices."""
        nonlocal steps
        steps += 1
        if steps == 1:
            fill(cache, seed=3)
        elif steps == 4:
            if kv is KV:
                _wait(lambda: pages.num_pages >= 2)
            crossed.append(receiver.snapshot().totals.received_bytes)

    runner.before = before
    async with running_prefill(
        cache, runner, budget_tokens=GRID, max_waiting=3, max_in_flight=1
    ) as loop:
        sampling = SamplingParams(0.0, 0, 1.0, 0, None)
        stop = StopConditions(9, 0, frozenset())
        loop.submit(GenerationRequest("r", tuple(range(PROMPT_LEN)), sampling, stop))
        stream = PageStream(ticket, loop, cache, sender)
        computed = await loop.computed("r")
        receipt = await stream.finish(computed.token.token_id)
        with await expectation.sealed(3.0) as received:
            meta = take_in(received, "r", PROMPT_LEN, target, pages.num_pages)
        assert (meta.position, steps) == (PROMPT_LEN, 4)
        for ours, theirs in zip(state_bytes(target), state_bytes(cache), strict=True):
            assert torch.equal(ours, theirs)
        assert receipt.size_bytes == receiver.snapshot().totals.received_bytes
        if kv is KV:
            assert crossed[0] > 0 and receiver.snapshot().totals.parts_received >= 2
        else:
            assert crossed == [0] and receiver.snapshot().totals.parts_received == 1
        await stream.stop()
        loop.abort("r")
    await sender.close()
    await receiver.close()


def _wait(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline_s, "no page crossed"
        time.sleep(0.001)
