"""Unknown fields are refused by name, at the first one."""

from __future__ import annotations

import pytest

from stateferry.api.inference_codec import RequestLimits, parse_generate
from stateferry.api.wire_fault import WireFault, locate_unknown
from stateferry.core.errors import InvalidRequest
from stateferry.v1 import inference_pb2 as pb

DESCRIPTOR = pb.GenerateRequest.DESCRIPTOR
FINE = pb.GenerateRequest(
    text="hello",
    sampling=pb.SamplingParams(temperature=0.5, seed=7),
    stop=pb.StopConditions(max_tokens=2, strings=["a"], token_ids=[1, 2, 300]),
    logprobs=3,
).SerializeToString()
TAG_99 = b"\x98\x06"


def nested(inner: bytes, field: int = 5) -> bytes:
    return bytes([field << 3 | 2, len(inner)]) + inner


@pytest.mark.parametrize(
    ("payload", "field", "problem"),
    [
        (FINE + TAG_99 + b"\x01", "request", "unknown field number 99"),
        (nested(TAG_99 + b"\x01") + FINE, "sampling", "unknown field number 99"),
        (FINE + bytes([3 << 3 | 0, 5]), "text", "has a value of another type"),
        (FINE + nested(bytes([1 << 3 | 0, 5])), "sampling.temperature", "another type"),
        (FINE + b"\x9b\x06\x9c\x06", "request", "unknown field"),
    ],
)
def test_the_first_one_is_named(payload: bytes, field: str, problem: str) -> None:
    fault = locate_unknown(payload, DESCRIPTOR)
    assert fault.field == field and problem in fault.problem


def test_nothing_known_is_blamed() -> None:
    assert locate_unknown(FINE, DESCRIPTOR) == WireFault("request", "holds unknown fields")
    packed = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1, 2, 3])).SerializeToString()
    assert locate_unknown(packed, DESCRIPTOR).problem == "holds unknown fields"


def test_the_walk_ends_at_the_first_one() -> None:
    """However many follow, and whatever follows: the walk is a server's time."""
    fault = locate_unknown(FINE + TAG_99 + b"\x01" + b"\xff" * 100, DESCRIPTOR)
    assert fault == WireFault("request", "unknown field number 99")


def test_a_megabyte_of_them_is_refused_by_name() -> None:
    limits = RequestLimits("tiny", 300, 4096, 1 << 20, frozenset())
    with pytest.raises(InvalidRequest, match="unknown field number 99"):
        parse_generate(FINE + (TAG_99 + b"\x01") * 350_000, limits)
