"""The HTTP door's answers, through a real router with scripted workers."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from http_front.front import RawCall, error_of, events_of, front
from router.fakes import FakeWorker
from router.scripts import (
    Events,
    decode_hangs_after_some,
    decode_well,
    prefill_hangs_before_token,
    prefill_well,
)

USAGE = {
    "prompt_tokens": 2,
    "completion_tokens": 4,
    "total_tokens": 6,
    "prompt_tokens_details": {"cached_tokens": 2},
}


async def test_a_completion_in_one_piece() -> None:
    async with front() as door:
        response = await door.complete(max_tokens=4, model="tiny")
        body = response.json()
        assert response.status_code == 200
        assert body["id"] == "cmpl-" + response.headers["x-request-id"]
        assert (body["object"], body["model"], body["usage"]) == ("text_completion", "tiny", USAGE)
        choice = {"index": 0, "text": "ABCD", "logprobs": None, "finish_reason": "length"}
        assert body["choices"] == [choice]
        assert isinstance(body["created"], int)
        await door.cluster.assert_clean()


async def test_a_completion_in_events() -> None:
    async with front() as door:
        options = {"stream": True, "stream_options": {"include_usage": True}}
        events = events_of(await door.complete(max_tokens=4, **options))
        *chunks, end, usage = events
        assert "".join(c["choices"][0]["text"] for c in chunks) == "ABCD"
        assert all(c["usage"] is None for c in (*chunks, end))
        assert end["choices"][0]["finish_reason"] == "length"
        assert (usage["choices"], usage["usage"]) == ([], USAGE)
        assert len({e["id"] for e in events}) == 1
        assert "usage" not in events_of(await door.complete(stream=True))[-1]


async def test_a_chat_in_one_piece_and_in_events() -> None:
    async with front() as door:
        body = (await door.chat(max_completion_tokens=3)).json()
        [choice] = body["choices"]
        assert body["object"] == "chat.completion"
        assert choice["message"] == {"role": "assistant", "content": "ABC", "refusal": None}
        [order] = door.cluster.prefill.requests
        assert bytes(order.prompt_ids) == b"User: hi\n\nAssistant:"
        assert list(order.snapshot_hints) == [len(b"User: hi\n\n")]
        first, *chunks, end = events_of(await door.chat(max_tokens=3, stream=True))
        assert first["object"] == "chat.completion.chunk"
        assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(c["choices"][0]["delta"]["content"] for c in chunks) == "ABC"
        assert (end["choices"][0]["delta"], end["choices"][0]["finish_reason"]) == ({}, "length")
        await door.cluster.assert_clean()


async def test_choices_and_stop_strings() -> None:
    async with front() as door:
        body = (await door.complete(n=3, stop=["D"], seed=-1, max_tokens=9)).json()
        assert [c["index"] for c in body["choices"]] == [0, 1, 2]
        assert {(c["text"], c["finish_reason"]) for c in body["choices"]} == {("ABC", "stop")}
        assert body["usage"]["prompt_tokens"] == 2
        assert body["usage"]["completion_tokens"] == 12
        events = events_of(await door.chat(n=2, stream=True, max_tokens=2))
        ends = [c for e in events for c in e["choices"] if c["finish_reason"]]
        assert sorted(c["index"] for c in ends) == [0, 1]


async def test_echo_and_prompts_by_token_id() -> None:
    async with front() as door:
        for prompt in ([104, 105], [[104, 105]], ["hi"], "hi"):
            body = (await door.complete(prompt=prompt, echo=True, max_tokens=2)).json()
            assert body["choices"][0]["text"] == "hiAB"


async def test_models_health_and_readiness() -> None:
    async with front() as door:
        [model] = (await door.client.get("/v1/models")).json()["data"]
        assert (model["id"], model["object"]) == ("tiny", "model")
        assert (await door.client.get("/v1/models/tiny")).json() == model
        missing = await door.client.get("/v1/models/some/other")
        assert (missing.status_code, error_of(missing)["code"]) == (404, "model_not_found")
        assert (await door.client.get("/health")).status_code == 200
        assert (await door.client.get("/ready")).status_code == 200
    async with front(join=False) as door:
        assert (await door.client.get("/health")).status_code == 200
        assert (await door.client.get("/ready")).status_code == 503


async def test_paths_that_do_not_exist() -> None:
    async with front() as door:
        assert error_of(await door.client.get("/v1/nothing"))["type"] == "invalid_request_error"
        response = await door.client.get("/v1/completions")
        assert (response.status_code, response.headers["allow"]) == (405, "POST")
        assert error_of(response)


async def test_nobody_to_serve_it() -> None:
    async with front(join=False, max_queue_s=0.0) as door:
        response = await door.complete()
        assert response.status_code in (429, 503)
        assert int(response.headers["retry-after"]) >= 1
        assert error_of(response)["type"] in ("rate_limit_error", "service_unavailable_error")


async def test_a_full_router_says_when_to_come_back() -> None:
    async with front(prefill_hangs_before_token, decode_well, max_requests=1) as door:
        first = RawCall(door.app, "/v1/completions", {"prompt": "hi"})
        await door.cluster.until(lambda: door.cluster.prefill.num_active == 1)
        response = await door.complete()
        assert (response.status_code, error_of(response)["type"]) == (429, "rate_limit_error")
        assert response.headers["retry-after"] == "1"
        first.leave()
        await first.task
        await door.cluster.assert_clean()


async def test_a_deadline_passes() -> None:
    async with front(prefill_hangs_before_token, decode_well) as door:
        response = await door.chat(timeout_s=0.1)
        assert (response.status_code, error_of(response)["type"]) == (408, "timeout_error")
        await door.cluster.assert_clean()


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_frees_its_workers(stream: bool) -> None:
    async with front(prefill_well, decode_hangs_after_some) as door:
        call = RawCall(door.app, "/v1/completions", {"prompt": "hi", "stream": stream})
        cluster = door.cluster
        await cluster.until(lambda: cluster.decode.num_active == 1 and cluster.prefill.sealed)
        if stream:
            await cluster.until(lambda: '"text":"BC"' in call.text)
        assert not cluster.is_clean
        call.leave()
        await asyncio.wait_for(call.task, 2)
        await cluster.assert_clean()
        assert cluster.decode.num_cancelled == 1
        assert "[DONE]" not in call.text


@pytest.mark.parametrize("takes", [0, 1, 2])
async def test_a_client_that_does_not_read_is_given_up(
    monkeypatch: pytest.MonkeyPatch, takes: int
) -> None:
    monkeypatch.setattr("stateferry.http_front.exchange.CLIENT_STALL_S", 0.2)
    async with front() as door:
        body = {"prompt": "hi", "stream": True, "max_tokens": 200}
        call = RawCall(door.app, "/v1/completions", body, takes)
        await asyncio.wait_for(call.task, 5)
        assert len(call.sent) == takes
        assert all(event.get("more_body", True) for event in call.sent)
        await door.cluster.assert_clean()


async def decode_fails_late(me: FakeWorker, request: Any, ticket: Any) -> Events:
    async for event in decode_hangs_after_some(me, request, ticket):
        yield event
        if event.HasField("tokens"):
            await me.context.abort(grpc.StatusCode.INTERNAL, "secret")


async def test_an_error_behind_the_first_event_ends_the_stream_without_done() -> None:
    async with front(prefill_well, decode_fails_late) as door:
        response = await door.complete(stream=True)
        assert response.status_code == 200
        assert "[DONE]" not in response.text
        last = response.text.rstrip().rpartition("data: ")[2]
        assert '"error"' in last
        assert "server_error" in last
        assert "secret" not in last
        await door.cluster.assert_clean()


async def test_a_worker_s_bug_is_a_server_error() -> None:
    async def prefill(me: FakeWorker, request: Any, ticket: Any) -> Events:
        await me.context.abort(grpc.StatusCode.INTERNAL, "secret")
        yield

    async with front(prefill, decode_well) as door:
        response = await door.complete()
        assert (response.status_code, error_of(response)["type"]) == (500, "server_error")
        assert "secret" not in response.text
