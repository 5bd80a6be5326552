"""Three processes and a hand-off give what one process gives: the same tokens, the same bytes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from e2e.asking import ask
from e2e.conftest import GRID, new_cluster
from stateferry.client import Client, Completion, GenerateOptions
from stateferry.core.request import GenerationRequest
from stateferry.core.sampling import SamplingParams, StopConditions
from stateferry.local import LocalCluster
from stateferry.worker.parts import EngineParts
from support.local_engine import local_engine
from support.pools import wait_until_idle
from support.random_requests import random_requests
from support.tiny_hybrid import ARCHITECTURES, write_tiny_hybrid
from support.tiny_model import EOS_ID

EOS = frozenset({EOS_ID})
EDGES = (1, 2, 3, 4, GRID - 1, GRID, GRID + 1, 2 * GRID, 5 * GRID + 3)


@pytest.fixture(scope="module", params=["Mamba2", *ARCHITECTURES])
def pair(
    request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, LocalCluster]]:
    """A model and a cluster that serves it."""
    model_dir = tiny_model
    if request.param != "Mamba2":
        model_dir = write_tiny_hybrid(tmp_path_factory.mktemp("model") / "tiny", request.param)
    with new_cluster(model_dir) as running:
        yield model_dir, running
        assert running.deaths == ()


async def test_200_requests_16_at_a_time(pair: tuple[Path, LocalCluster]) -> None:
    model_dir, cluster = pair
    requests = random_requests(200, seed=1, lengths=EDGES)
    engine, parts = local_engine(model_dir)
    expected = await asyncio.to_thread(engine.generate, requests)
    parts.cache.check_conserved()
    gate = asyncio.Semaphore(16)
    handed_off = 0

    async with Client(cluster.router_address) as client:

        async def check(request: GenerationRequest) -> None:
            nonlocal handed_off
            async with gate:
                ids, logprobs, completion = await ask(client, request)
            output = expected[request.request_id]
            assert ids == output.token_ids
            # Equal as floats: the wire carries them in single precision, as the sampler made them.
            assert logprobs == [token.logprob for token in output.tokens]
            assert output.finish_reason is not None
            assert completion.finish_reason == output.finish_reason.value
            assert completion.prompt_tokens == request.prompt_len
            assert completion.completion_tokens == len(ids)
            if completion.prefill_worker.startswith("decode"):
                # So short that decode happened to have half of it.
                assert request.prompt_len <= 4 and completion.timings.handoff_bytes == 0
            elif len(ids) > 1:
                handed_off += 1
                assert completion.timings.transport == "ucx"
                assert completion.timings.handoff_bytes == handoff_bytes(parts, request.prompt_len)
                assert completion.decode_worker

        async with asyncio.TaskGroup() as group:
            for request in requests:
                group.create_task(check(request))
        await wait_until_idle(client, within_s=2)
    assert handed_off > 100, "too few hand-offs to mean anything"


def handoff_bytes(parts: EngineParts, prompt_len: int) -> int:
    """The size of a sequence's state from the geometries alone."""
    pools = parts.cache.pools
    g, kv = pools.states.geometry, pools.kv.geometry
    state = g.nheads * g.headdim * g.dstate * 4 + g.conv_dim * (g.d_conv - 1) * 4
    row = 4 * (g.conv_dim + g.nheads * g.headdim + g.ngroups * g.dstate + g.nheads)
    recurrent = g.num_layers * (state * (prompt_len >= GRID) + row * (prompt_len % GRID))
    return recurrent + kv.num_layers * 2 * kv.kv_heads * kv.head_dim * 4 * prompt_len


async def test_same_seed_same_tokens_in_any_company(cluster: LocalCluster) -> None:
    [request] = random_requests(1, seed=5, lengths=EDGES)
    request = GenerationRequest(
        "solo", request.prompt_ids, SamplingParams(1.0, 0, 1.0, 42, 0), request.stop
    )
    async with Client(cluster.router_address) as client:
        alone = await ask(client, request)
        crowd = [ask(client, other) for other in random_requests(10, seed=6, lengths=EDGES)]
        again = GenerationRequest("again", request.prompt_ids, request.sampling, request.stop)
        together, *_ = await asyncio.gather(ask(client, again), *crowd)
    assert alone[:2] == together[:2]


async def test_an_id_may_be_used_again_at_once(cluster: LocalCluster) -> None:
    """After a good end, and after a cancel that the workers may not have heard of yet."""
    request = GenerationRequest(
        "again", tuple(range(3, 70)), SamplingParams(0.0, 0, 1.0, 0, 0), StopConditions(9, 0, EOS)
    )
    async with Client(cluster.router_address) as client:
        first = await ask(client, request)
        for _ in range(20):
            options = GenerateOptions(max_tokens=5000, request_id="again", ignore_eos=True)
            async with contextlib.aclosing(client.generate(request.prompt_ids, options)) as events:
                await anext(events)
            # The router itself may still hold the id for a moment: it then says so.
            again = await _ask_when_free(client, request)
            assert again[:2] == first[:2]
        await wait_until_idle(client, within_s=3)


async def _ask_when_free(
    client: Client, request: GenerationRequest
) -> tuple[list[int], list[float], Completion]:
    for _ in range(100):
        try:
            return await ask(client, request)
        except grpc.aio.AioRpcError as error:
            assert (error.details() or "").startswith("request_id: "), error
            await asyncio.sleep(0.01)
    raise AssertionError("the id never became free")
