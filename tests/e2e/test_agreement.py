"""Three processes and a hand-off give what one process gives: the same tokens, the same bytes."""

from __future__ import annotations

import asyncio
import contextlib
import random
from pathlib import Path

import grpc

from stateferry.client import Client, Completion, Delta, GenerateOptions
from stateferry.core.request import GenerationRequest
from stateferry.core.sampling import SamplingParams, StopConditions
from stateferry.local import LocalCluster
from support.local_engine import local_engine
from support.pools import wait_until_idle
from support.tiny_model import EOS_ID

GRID = 32
EOS = frozenset({EOS_ID})
EDGES = (1, 2, 3, 4, GRID - 1, GRID, GRID + 1, 2 * GRID, 5 * GRID + 3)


def random_requests(count: int, seed: int) -> list[GenerationRequest]:
    rng = random.Random(seed)
    requests = []
    for number in range(count):
        length = rng.choice(EDGES) if rng.random() < 0.5 else rng.randint(1, 300)
        requests.append(
            GenerationRequest(
                request_id=f"agree-{seed}-{number}",
                prompt_ids=tuple(rng.randrange(3, 259) for _ in range(length)),
                sampling=SamplingParams(
                    temperature=rng.choice([0.0, 0.0, 0.8, 1.3]),
                    top_k=rng.choice([0, 20]),
                    top_p=rng.choice([1.0, 0.9]),
                    seed=rng.getrandbits(64),
                    logprobs=0,
                ),
                stop=StopConditions(rng.choice([1, 2, 17, 40]), 0, frozenset({EOS_ID})),
            )
        )
    return requests


async def ask(
    client: Client, request: GenerationRequest
) -> tuple[list[int], list[float], Completion]:
    sampling, ids, logprobs = request.sampling, [], []
    options = GenerateOptions(
        max_tokens=request.stop.max_tokens,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        seed=sampling.seed,
        logprobs=0,
        request_id=request.request_id,
        timeout_s=60,
    )
    completion: Completion | None = None
    async for event in client.generate(request.prompt_ids, options):
        if isinstance(event, Delta):
            if event.token_ids:
                assert event.index == len(ids), "a gap or a repetition in the stream"
            ids += event.token_ids
            logprobs += event.logprobs
        else:
            completion = event
    assert completion is not None
    return ids, logprobs, completion


async def test_200_requests_16_at_a_time(cluster: LocalCluster, tiny_model: Path) -> None:
    requests = random_requests(200, seed=1)
    engine, parts = local_engine(tiny_model)
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
            if len(ids) > 1:
                handed_off += 1
                check_handoff(completion, request.prompt_len)

        def check_handoff(completion: Completion, prompt_len: int) -> None:
            assert completion.timings.transport == "ucx"
            assert completion.timings.handoff_bytes == state_bytes(prompt_len)
            assert completion.decode_worker

        def state_bytes(prompt_len: int) -> int:
            """The size of a state from its geometry alone."""
            g = parts.cache.pool.geometry
            state = g.nheads * g.headdim * g.dstate * 4 + g.conv_dim * (g.d_conv - 1) * 4
            row = 4 * (g.conv_dim + g.nheads * g.headdim + g.ngroups * g.dstate + g.nheads)
            return g.num_layers * (state * (prompt_len >= GRID) + row * (prompt_len % GRID))

        async with asyncio.TaskGroup() as group:
            for request in requests:
                group.create_task(check(request))
        await wait_until_idle(client, within_s=2)
    assert handed_off > 100, "too few hand-offs to mean anything"


async def test_same_seed_same_tokens_in_any_company(cluster: LocalCluster) -> None:
    [request] = random_requests(1, seed=5)
    request = GenerationRequest(
        "solo", request.prompt_ids, SamplingParams(1.0, 0, 1.0, 42, 0), request.stop
    )
    async with Client(cluster.router_address) as client:
        alone = await ask(client, request)
        crowd = [ask(client, other) for other in random_requests(10, seed=6)]
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
