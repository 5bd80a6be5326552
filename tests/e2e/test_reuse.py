"""What a cluster reuses of earlier prompts, for whom, and that it changes no bit."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

import pytest

from e2e.conftest import GRID
from stateferry.client import Client, Completion, Delta, GenerateOptions
from stateferry.local import LocalCluster

ONE_TOKEN = GenerateOptions(max_tokens=1, temperature=0.0, ignore_eos=True, logprobs=0)


def fresh(length: int, seed: int) -> tuple[int, ...]:
    rng = random.Random(f"reuse-{seed}")
    return tuple(rng.randrange(3, 259) for _ in range(length))


async def resumed(
    client: Client, ids: Sequence[int], **options: object
) -> tuple[int, tuple[int, ...]]:
    """How much of a prompt came from a cache, and the token after it."""
    token_ids: tuple[int, ...] = ()
    completion: Completion | None = None
    wanted = dataclasses.replace(ONE_TOKEN, **options)  # type: ignore[arg-type]
    async for event in client.generate(ids, wanted):
        if isinstance(event, Delta):
            token_ids += event.token_ids
        elif isinstance(event, Completion):
            completion = event
    assert completion is not None and completion.prefix_tokens == completion.resumed_tokens
    return completion.resumed_tokens, token_ids


WHO = [
    {},
    {"cache_salt": "a"},
    {"cache_salt": "b"},
    {"tenant": "a"},
    {"tenant": "b"},
    {"tenant": "a", "cache_salt": "a"},
    {"cache_salt": "é" * 128},
    # Bytes that take most room in a ticket.
    {"tenant": "t" * 128, "cache_salt": "\x01" * 256, "request_id": "r" * 128},
]


async def test_tenants_and_salts_share_nothing(cluster: LocalCluster) -> None:
    ids = fresh(3 * GRID + 5, seed=1)
    async with Client(cluster.router_address) as client:
        tokens = set()
        for who in WHO:
            depth, token_ids = await resumed(client, ids, **who)
            assert depth == 0, f"{who} saw what somebody else had computed"
            tokens.add(token_ids)
        for who in WHO:
            depth, token_ids = await resumed(client, ids, **who)
            assert depth == len(ids)
            tokens.add(token_ids)
        assert len(tokens) == 1


@pytest.mark.parametrize("hinted", [False, True])
async def test_a_hint_lets_the_first_prompt_that_parts_there_resume(
    cluster: LocalCluster, hinted: bool
) -> None:
    """Without one it resumes at the nearest state that was kept on the way, every second grid point
    while memory is free."""
    parts_at = 3 * GRID + 2
    stem = fresh(6 * GRID, seed=2 + hinted)
    async with Client(cluster.router_address) as client:
        hints = (parts_at,) if hinted else ()
        assert (await resumed(client, stem, snapshot_hints=hints))[0] == 0
        other = (*stem[:parts_at], *fresh(GRID, seed=9))
        depth, _ = await resumed(client, other)
        assert depth == (3 * GRID if hinted else 2 * GRID)
