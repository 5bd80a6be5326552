"""What can never be served is refused at once, by name, and leaves nothing behind."""

from __future__ import annotations

import time
from collections.abc import Callable

import grpc
import pytest

from stateferry.client import Client
from stateferry.local import LocalCluster
from stateferry.v1 import inference_pb2 as pb
from support.pools import wait_until_idle

Edit = Callable[[pb.GenerateRequest], None]


def fine() -> pb.GenerateRequest:
    return pb.GenerateRequest(
        text="hello",
        sampling=pb.SamplingParams(temperature=0.0),
        stop=pb.StopConditions(max_tokens=2),
    )


def edited(edit: Edit) -> bytes:
    request = fine()
    edit(request)
    return request.SerializeToString()


def with_stop_bytes(stop: bytes) -> bytes:
    """A stop string that no protobuf library would write: field 6, then field 3 inside."""
    inner = bytes([3 << 3 | 2, len(stop)]) + stop
    request = pb.GenerateRequest(text="hello").SerializeToString()
    return request + bytes([6 << 3 | 2, len(inner)]) + inner


BAD = {
    "text": edited(lambda r: setattr(r, "text", "")),
    "prompt": pb.GenerateRequest().SerializeToString(),
    "token_ids": edited(lambda r: r.token_ids.SetInParent()),
    "token_ids.ids[1]": edited(lambda r: r.token_ids.ids.extend([5, 1 << 20])),
    "stop.max_tokens": edited(lambda r: setattr(r.stop, "max_tokens", 0)),
    "stop.max_tokens ": edited(lambda r: setattr(r.stop, "max_tokens", 2**31)),
    "stop.strings[0]": with_stop_bytes(b"\xff\xfe"),
    "sampling.temperature": edited(lambda r: setattr(r.sampling, "temperature", float("nan"))),
    "sampling.temperature ": edited(lambda r: setattr(r.sampling, "temperature", -1.0)),
    "sampling.top_p": edited(lambda r: setattr(r.sampling, "top_p", 1.5)),
    "logprobs": edited(lambda r: setattr(r, "logprobs", 1000)),
    "model": edited(lambda r: setattr(r, "model", "no such model")),
    "request_id": edited(lambda r: setattr(r, "request_id", "a b")),
    "cache_salt": edited(lambda r: setattr(r, "cache_salt", "x" * 257)),
    "snapshot_hints": edited(lambda r: r.snapshot_hints.extend([1] * 65)),
    "snapshot_hints[0]": edited(lambda r: r.snapshot_hints.append(6)),
    "request": fine().SerializeToString() + b"\x98\x06\x01",
    "text ": edited(lambda r: setattr(r, "text", "x" * 10_000_000)),
}


async def refuse(address: str, payload: bytes) -> tuple[grpc.StatusCode, str, float]:
    async with grpc.aio.insecure_channel(address) as channel:
        await channel.channel_ready()
        call = channel.unary_stream(
            "/stateferry.v1.Inference/Generate",
            request_serializer=lambda payload: payload,
            response_deserializer=pb.GenerateResponse.FromString,
        )
        began_s = time.monotonic()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in call(payload, timeout=20):
                pass
        took_s = time.monotonic() - began_s
        return caught.value.code(), caught.value.details() or "", took_s


@pytest.mark.parametrize("field", BAD)
async def test_is_invalid_argument_naming_the_field(cluster: LocalCluster, field: str) -> None:
    code, details, took_s = await refuse(cluster.router_address, BAD[field])
    assert code is grpc.StatusCode.INVALID_ARGUMENT, details
    assert details.startswith(field.strip() + ": ")
    if field == "request":
        assert "unknown field number 99" in details
    # The time of a check; ten megabytes also have to be sent.
    assert took_s < 1.0
    async with Client(cluster.router_address) as client:
        await wait_until_idle(client, within_s=2)


async def test_a_good_request_still_works_after_all_of_them(cluster: LocalCluster) -> None:
    for payload in BAD.values():
        await refuse(cluster.router_address, payload)
    async with Client(cluster.router_address) as client:
        events = [event async for event in client.generate("hello")]
    assert events
