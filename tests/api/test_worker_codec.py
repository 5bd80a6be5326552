"""Workers refuse sampling values that no router of ours sends."""

from __future__ import annotations

import math
from typing import Any

import pytest

from stateferry.api.sampling_codec import sampling_from_pb, sampling_to_pb
from stateferry.core.errors import InvalidRequest
from stateferry.core.guide import Guide, GuideKind
from stateferry.core.sampling import Penalties, SamplingParams
from stateferry.v1 import worker_pb2 as pb

VOCAB_SIZE = 300


def fine() -> pb.WorkerSampling:
    return pb.WorkerSampling(temperature=0.5, top_p=0.75, top_k=3, seed=2**64 - 1, logprobs=20)


@pytest.mark.parametrize("logprobs", [None, 0, 20])
def test_round_trip(logprobs: int | None) -> None:
    sampling = SamplingParams(0.5, 3, 0.75, 2**64 - 1, logprobs)
    assert sampling_from_pb(sampling_to_pb(sampling), VOCAB_SIZE) == sampling


@pytest.mark.parametrize("kind", list(GuideKind))
def test_round_trip_of_everything(kind: GuideKind) -> None:
    sampling = SamplingParams(
        0.5,
        3,
        0.75,
        1,
        0,
        min_p=0.25,
        penalties=Penalties(1.5, -0.5, 2.0),
        logit_bias=((0, -100.0), (299, 0.5)),
        guide=Guide(kind, "é"),
    )
    assert sampling_from_pb(sampling_to_pb(sampling), VOCAB_SIZE) == sampling


@pytest.mark.parametrize(
    ("field", "change"),
    [
        *(("temperature", {"temperature": v}) for v in (math.nan, math.inf, -1.0)),
        *(("top_p", {"top_p": v}) for v in (0.0, math.nan, 1.5)),
        *(("min_p", {"min_p": v}) for v in (math.nan, -0.5, 1.5)),
        ("logprobs", {"logprobs": 21}),
        ("penalties.repetition", {"penalties": pb.WorkerPenalties(presence=1.0)}),
        *(
            (f"penalties.{name}", {"penalties": pb.WorkerPenalties(**{"repetition": 1.0, name: v})})
            for name in ("repetition", "presence", "frequency")
            for v in (math.nan, math.inf)
        ),
        ("logit_bias", {"logit_bias": [pb.WorkerLogitBias(token_id=300)]}),
        ("logit_bias", {"logit_bias": [pb.WorkerLogitBias(token_id=1, bias=math.inf)]}),
        ("guide.kind", {"guide": pb.WorkerGuide(kind="prose", source="x")}),
        ("guide.source", {"guide": pb.WorkerGuide(kind="regex", source="x" * (1 << 15) + "x")}),
    ],
)
def test_a_value_out_of_range_is_named(field: str, change: dict[str, Any]) -> None:
    message = fine()
    message.MergeFrom(pb.WorkerSampling(**change))
    if "top_p" in change:
        message.top_p = change["top_p"]
    with pytest.raises(InvalidRequest, match=f"sampling.{field}: "):
        sampling_from_pb(message, VOCAB_SIZE)
