"""The HTTP door of a real cluster, through the client that it is made for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from e2e.conftest import new_cluster
from stateferry.client import Client, Delta, GenerateOptions
from stateferry.local import LocalCluster
from support.pools import wait_until_idle

SYSTEM = {"role": "system", "content": "All answers are short, honest and polite. " * 8}
QUIET: dict[str, Any] = {"ignore_eos": True}


@pytest.fixture(scope="module")
def served(tiny_model: Path) -> Iterator[LocalCluster]:
    with new_cluster(tiny_model, model__name="tiny") as running:
        yield running
        assert running.deaths == ()


@pytest.fixture
async def client(served: LocalCluster) -> AsyncIterator[openai.AsyncOpenAI]:
    base_url = f"http://{served.addresses['router']['http']}/v1"
    async with openai.AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0) as client:
        yield client


async def test_the_tokens_are_those_of_the_grpc_door(
    served: LocalCluster, client: openai.AsyncOpenAI
) -> None:
    answer = await client.completions.create(
        model="tiny", prompt="Once", max_tokens=40, seed=5, logprobs=2, extra_body=QUIET
    )
    options = GenerateOptions(max_tokens=40, temperature=1.0, seed=5, logprobs=2, ignore_eos=True)
    async with Client(served.router_address) as grpc_client:
        events = [e async for e in grpc_client.generate("Once", options)]
    deltas = [event for event in events if isinstance(event, Delta)]
    assert answer.choices[0].text == "".join(delta.text for delta in deltas)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs == [value for delta in deltas for value in delta.logprobs]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 40
    assert answer.choices[0].finish_reason == "length"


async def test_a_stream_says_what_the_whole_answer_says(client: openai.AsyncOpenAI) -> None:
    asked: dict[str, Any] = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "Hello"}],
        "max_tokens": 30,
        "seed": 3,
        "extra_body": QUIET,
    }
    whole = await client.chat.completions.create(**asked)
    texts, usage, reasons = [], None, []
    options = {"include_usage": True}
    async for chunk in await client.chat.completions.create(
        **asked, stream=True, stream_options=options
    ):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts.append(choice.delta.content or "")
            reasons += [choice.finish_reason] if choice.finish_reason else []
    assert len([text for text in texts if text]) > 1
    assert "".join(texts) == whole.choices[0].message.content
    assert reasons == [whole.choices[0].finish_reason] == ["length"]
    assert usage is not None
    assert usage.completion_tokens == 30


async def test_a_shared_system_prompt_is_computed_once(client: openai.AsyncOpenAI) -> None:
    async def cached(question: str) -> int:
        messages: Any = [SYSTEM, {"role": "user", "content": question}]
        answer = await client.chat.completions.create(
            model="tiny", messages=messages, max_tokens=4, extra_body=QUIET
        )
        assert answer.usage is not None
        assert answer.usage.prompt_tokens_details is not None
        return answer.usage.prompt_tokens_details.cached_tokens or 0

    assert await cached("Who was first?") == 0
    # Up to the grid point before its end.
    assert await cached("And which is the second one?") > len(SYSTEM["content"]) - 64


async def test_json_comes_out_where_json_is_asked_for(client: openai.AsyncOpenAI) -> None:
    form: Any = {
        "type": "json_schema",
        "json_schema": {"name": "yes", "schema": {"enum": ["yes", "no"]}},
    }
    answer = await client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "?"}], response_format=form
    )
    assert answer.choices[0].message.content in ('"yes"', '"no"')
    assert answer.choices[0].finish_reason == "stop"


async def test_errors_are_the_client_s_own_kinds(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await client.completions.create(model="tiny", prompt="x", extra_body={"best": 1})
    assert caught.value.param == "best"
    with pytest.raises(openai.NotFoundError):
        await client.completions.create(model="gpt", prompt="x")
    [model] = (await client.models.list()).data
    assert model.id == "tiny"


async def test_a_client_that_leaves_frees_the_pools(
    served: LocalCluster, client: openai.AsyncOpenAI
) -> None:
    stream = await client.completions.create(
        model="tiny", prompt="Once", max_tokens=20_000, stream=True, extra_body=QUIET
    )
    async for _ in stream:
        break
    await stream.close()
    waiting = client.completions.create(
        model="tiny", prompt="Once", max_tokens=20_000, extra_body=QUIET
    )
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(waiting, 0.5)
    async with Client(served.router_address) as grpc_client:
        await wait_until_idle(grpc_client, within_s=3)
