"""Workers refuse sampling values that no router of ours sends."""

from __future__ import annotations

import math

import pytest

from stateferry.api.worker_codec import sampling_from_pb, sampling_to_pb
from stateferry.core.errors import InvalidRequest
from stateferry.core.sampling import SamplingParams
from stateferry.v1 import worker_pb2

FINE = {"temperature": 0.5, "top_p": 0.75, "top_k": 3, "seed": 2**64 - 1, "logprobs": 20}


@pytest.mark.parametrize("logprobs", [None, 0, 20])
def test_round_trip(logprobs: int | None) -> None:
    sampling = SamplingParams(0.5, 3, 0.75, 2**64 - 1, logprobs)
    assert sampling_from_pb(sampling_to_pb(sampling)) == sampling


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", -1.0),
        ("top_p", 0.0),
        ("top_p", math.nan),
        ("top_p", 1.5),
        ("logprobs", 21),
    ],
)
def test_a_value_out_of_range_is_named(field: str, value: float) -> None:
    message = worker_pb2.WorkerSampling(**{**FINE, field: value})  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match=f"sampling.{field}"):
        sampling_from_pb(message)
