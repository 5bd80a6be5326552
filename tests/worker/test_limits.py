"""What a worker refuses though its router let it pass."""

from __future__ import annotations

import dataclasses

import pytest

from stateferry.core.errors import InvalidRequest
from stateferry.core.request import GenerationRequest
from stateferry.core.sampling import SamplingParams, StopConditions
from stateferry.worker.limits import ModelLimits, check_request

LIMITS = ModelLimits(vocab_size=300, max_context_tokens=64)
FINE = GenerationRequest(
    "r",
    (0, 299, 5),
    SamplingParams(0.0, 0, 1.0, 0, None),
    StopConditions(61, 0, frozenset({299})),
    snapshot_hints=(1, 3),
)


def test_what_fits_exactly_passes() -> None:
    check_request(FINE, LIMITS)


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("prompt_ids", {"prompt_ids": ()}),
        ("prompt_ids", {"prompt_ids": (5, 300)}),
        ("stop.stop_token_ids", {"stop": StopConditions(1, 0, frozenset({300}))}),
        ("stop.max_tokens", {"stop": StopConditions(62, 0, frozenset())}),
        ("snapshot_hints", {"snapshot_hints": (2, 4)}),
        ("snapshot_hints", {"snapshot_hints": (0,)}),
    ],
)
def test_what_does_not_is_named(field: str, change: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_request(dataclasses.replace(FINE, **change), LIMITS)  # type: ignore[arg-type]
    assert caught.value.field == field
