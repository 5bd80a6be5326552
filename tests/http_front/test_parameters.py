"""JSON fields become the fields of the gRPC API; what is wrong or unknown is named."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from http_front.front import MAX_BODY_BYTES, error_of, front
from stateferry.core.errors import InvalidRequest
from stateferry.http_front.chat import read_chat
from stateferry.http_front.completions import read_completion
from stateferry.http_front.errors import json_name
from stateferry.v1 import inference_pb2 as pb

SAMPLING: dict[str, Any] = {
    "temperature": 0.5,
    "top_p": 0.25,
    "top_k": 7,
    "min_p": 0.125,
    "seed": 9,
    "repetition_penalty": 1.5,
    "presence_penalty": -0.5,
    "frequency_penalty": 0.75,
}
SHARED: dict[str, Any] = {
    **SAMPLING,
    "model": "tiny",
    "n": 2,
    "stop": ["a", "b"],
    "stop_token_ids": [4],
    "min_tokens": 1,
    "ignore_eos": True,
    "include_stop_str_in_output": True,
    "skip_special_tokens": False,
    "logit_bias": {"5": -1.5},
    "tenant": "t",
    "cache_salt": "salt",
    "session_id": "s",
    "priority": -3,
    "user": "somebody, ignored",
}
MESSAGES = [{"role": "user", "content": "hi"}]


def expected() -> pb.GenerateRequest:
    wanted = pb.GenerateRequest(
        model="tiny",
        n=2,
        skip_special_tokens=False,
        tenant="t",
        cache_salt="salt",
        session_id="s",
        priority=-3,
    )
    for name, value in SAMPLING.items():
        setattr(wanted.sampling, name, value)
    wanted.sampling.logit_bias.add(token_id=5, bias=-1.5)
    wanted.stop.strings.extend(["a", "b"])
    wanted.stop.token_ids.append(4)
    wanted.stop.min_tokens, wanted.stop.max_tokens = 1, 6
    wanted.stop.ignore_eos = wanted.stop.include_stop = True
    return wanted


def test_every_field_of_a_completion_arrives() -> None:
    order = read_completion({**SHARED, "prompt": "hi", "max_tokens": 6, "logprobs": 3})
    wanted = expected()
    wanted.text, wanted.logprobs = "hi", 3
    assert order.message == wanted
    echo = read_completion({"prompt": "hi", "logprobs": 0, "echo": True}).message
    assert echo.HasField("prompt_logprobs")
    assert echo.prompt_logprobs == 0


def test_every_field_of_a_chat_arrives() -> None:
    body = {**SHARED, "messages": MESSAGES, "max_completion_tokens": 6, "logprobs": True}
    order, conversation = read_chat({**body, "top_logprobs": 3})
    wanted = expected()
    wanted.logprobs = 3
    assert order.message == wanted
    assert conversation.messages == MESSAGES
    assert read_chat({**body, "max_tokens": 6})[0].message.logprobs == 0


def test_response_formats_become_guides() -> None:
    def guide(form: dict[str, Any]) -> pb.Guide:
        return read_completion({"prompt": "hi", "response_format": form}).message.guide

    schema = {"type": "object", "title": "é"}
    wanted = {"name": "x", "strict": True, "schema": schema}
    made = guide({"type": "json_schema", "json_schema": wanted})
    assert json.loads(made.json_schema) == schema
    assert guide({"type": "json_object"}).json_object
    assert guide({"type": "text"}).WhichOneof("form") is None


def test_neutral_spellings() -> None:
    message = read_completion({"prompt": "hi", "top_k": -1, "seed": -1, "stop": "x"}).message
    assert message.sampling.top_k == 0
    assert message.sampling.seed == (1 << 64) - 1
    assert list(message.stop.strings) == ["x"]
    nothing = dict.fromkeys([*SHARED, "stream_options", "suffix", "logprobs", "best_of"])
    plain = read_completion({"prompt": "hi"}).message
    assert read_completion({**nothing, "prompt": "hi"}).message == plain
    assert plain == pb.GenerateRequest(text="hi", stop=pb.StopConditions())
    asks_nothing = {"tools": [], "tool_choice": "none", "modalities": ["text"], "store": False}
    read_chat({"messages": MESSAGES, **asks_nothing})


def test_contents_in_parts_and_messages_of_tools() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}], "refusal": None}
    _, conversation = read_chat({"messages": [{"role": "user", "content": parts}, call]})
    first, second = conversation.messages
    assert first["content"] == "a\nb"
    assert second == {"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"frobnicate": 1}, "frobnicate"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": 1e300}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": 1 << 40}, "max_tokens"),
        ({"n": 17}, "n"),
        ({"n": 2, "temperature": 0}, "n"),
        ({"stop": ["x", ""]}, "stop[1]"),
        ({"stop": [1]}, "stop"),
        ({"stop_token_ids": [900]}, "stop_token_ids[0]"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias[0].bias"),
        ({"priority": 101}, "priority"),
        ({"session_id": "a b"}, "session_id"),
        ({"cache_salt": "x" * 257}, "cache_salt"),
        ({"stream_options": {}}, "stream_options"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
        ({"timeout_s": 0}, "timeout_s"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {}}},
            "response_format.json_schema.schema",
        ),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"schema": {"type": "nonsense"}},
                }
            },
            "response_format",
        ),
    ],
)
async def test_what_is_wrong_is_named_by_both_endpoints(body: dict[str, Any], param: str) -> None:
    async with front() as door:
        for response in (await door.complete(**body), await door.chat(**body)):
            assert response.status_code == 400, response.text
            error = error_of(response)
            assert (error["param"], error["type"]) == (param, "invalid_request_error")
            assert error["message"].startswith(param)
        assert door.cluster.prefill.tickets == []
        await door.cluster.assert_clean()


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"prompt": [1, 300]}, "prompt"),
        ({"prompt": [1, -1]}, "prompt"),
        ({"prompt": {}}, "prompt"),
        ({"logprobs": 21}, "logprobs"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"echo": True, "n": 2}, "echo"),
    ],
)
async def test_what_is_wrong_in_a_completion(body: dict[str, Any], param: str) -> None:
    async with front() as door:
        response = await door.complete(**body)
        assert (response.status_code, error_of(response)["param"]) == (400, param)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": {}}, "messages"),
        ({"messages": ["hi"]}, "messages[0]"),
        ({"messages": [{"content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 1}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "mood": 1}]}, "messages[0].mood"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0]",
        ),
        ({"messages": [{"role": "user", "content": "x" * 5000}]}, "messages"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": 1}, "logprobs"),
        ({"chat_template_kwargs": {"messages": 1}}, "chat_template_kwargs.messages"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_completion_tokens"),
        ({"echo": True}, "echo"),
    ],
)
async def test_what_is_wrong_in_a_chat(body: dict[str, Any], param: str) -> None:
    async with front() as door:
        response = await door.chat(**body)
        assert (response.status_code, error_of(response)["param"]) == (400, param)


async def test_another_model_and_a_bad_request_id() -> None:
    async with front() as door:
        response = await door.complete(model="gpt")
        assert (response.status_code, error_of(response)["code"]) == (404, "model_not_found")
        headers = {"X-Request-Id": "a b"}
        response = await door.client.post("/v1/completions", json={"prompt": "a"}, headers=headers)
        assert (response.status_code, error_of(response)["param"]) == (400, "X-Request-Id")
        headers = {"X-Request-Id": "mine"}
        response = await door.client.post("/v1/completions", json={"prompt": "a"}, headers=headers)
        assert response.json()["id"] == "cmpl-mine"


GARBAGE = [
    b"",
    b"{",
    b"[]",
    b"null",
    b"\xff\xfe",
    b'{"prompt": "\\ud800"}',
    b'{"prompt": "hi", "stop": "\\udfff"}',
    b'{"\\ud800": 1}',
    b'{"prompt": "hi", "temperature": NaN}',
    b'{"prompt": "hi", "temperature": 1e999}',
    b'{"prompt": "hi", "seed": ' + b"9" * 5000 + b"}",
    b'{"prompt": ' + b"[" * 40_000 + b"]" * 40_000 + b"}",
]


async def test_garbage_is_never_a_server_error() -> None:
    rng = random.Random(7)
    good = json.dumps({"prompt": "hi", "messages": MESSAGES, **SHARED}).encode()
    bodies = list(GARBAGE)
    for _ in range(150):
        body = bytearray(good)
        for _ in range(rng.randrange(1, 6)):
            body[rng.randrange(len(body))] = rng.randrange(256)
        bodies.append(bytes(body))
    statuses = set()
    async with front() as door:
        for path in ("/v1/completions", "/v1/chat/completions"):
            for body in bodies:
                headers = {"content-type": "application/json"}
                response = await door.client.post(path, content=body, headers=headers)
                statuses.add(response.status_code)
                assert response.status_code in (200, 400, 404), body
                if body in GARBAGE:
                    assert response.status_code == 400, body[:80]
                    assert error_of(response)["message"]
        await door.cluster.assert_clean()
    assert 400 in statuses


async def test_a_body_is_bounded_and_is_json_by_its_type() -> None:
    async with front() as door:
        response = await door.complete(user="x" * MAX_BODY_BYTES)
        assert (response.status_code, error_of(response)["type"]) == (413, "invalid_request_error")
        response = await door.client.post("/v1/completions", content=b'{"prompt": "hi"}')
        assert (response.status_code, error_of(response)["param"]) == (400, "Content-Type")


def test_infinity_is_no_number() -> None:
    with pytest.raises(InvalidRequest):
        read_completion({"prompt": "hi", "temperature": float("inf")})


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("token_ids.ids[3]", "p"),
        ("text", "p"),
        ("sampling.top_p", "top_p"),
        ("stop.strings[2]", "stop[2]"),
        ("stop.max_tokens", "max_tokens"),
        ("guide.json_schema", "response_format"),
        ("prompt_logprobs", "logprobs"),
    ],
)
def test_proto_paths_have_names_in_json(path: str, name: str) -> None:
    assert json_name(path, "p") == name
