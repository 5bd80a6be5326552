"""Which states a decoding sequence leaves, and settings that are refused with what to set."""

from __future__ import annotations

from typing import Any

import pytest

from stateferry.core.errors import ConfigError
from stateferry.prefix.state_tracking import StateStrategy, check_tracking

FINE: dict[str, Any] = dict(
    strategy="extra_buffer", grid=64, interval=256, draft_tokens=8, d_conv=4, page_tokens=64
)


def test_each_strategy_keeps_what_it_says() -> None:
    kept = {}
    for strategy in ("extra_buffer", "no_buffer", "off"):
        tracking = check_tracking(**FINE | {"strategy": strategy})
        assert tracking.strategy is StateStrategy(strategy)
        points = [p for p in range(64, 1025, 64) if tracking.keeps_boundary(p)]
        kept[strategy] = (points, tracking.keeps_end())
    assert kept == {
        "extra_buffer": ([256, 512, 768, 1024], True),
        "no_buffer": ([], True),
        "off": ([], False),
    }


@pytest.mark.parametrize("grid", [32, 64, 128, 256])
@pytest.mark.parametrize("page_tokens", [None, 16, 32])
def test_usual_sizes_are_fine(grid: int, page_tokens: int | None) -> None:
    tracking = check_tracking(**FINE | {"grid": grid, "page_tokens": page_tokens})
    assert (tracking.grid, tracking.interval) == (grid, 256)


@pytest.mark.parametrize(
    ("wrong", "key", "fix"),
    [
        ({"strategy": "lazy"}, "cache.state_strategy", "extra_buffer, no_buffer, off"),
        ({"interval": 100}, "cache.track_interval_tokens", "set 128"),
        ({"interval": 0}, "cache.track_interval_tokens", "set 64"),
        ({"interval": 32}, "cache.track_interval_tokens", "set 64"),
        ({"interval": 64, "draft_tokens": 65}, "cache.track_interval_tokens", "set 128 or more"),
        ({"grid": 4, "d_conv": 5}, "model.grid_tokens", "set 5 or more"),
        ({"page_tokens": 48}, "model.grid_tokens", "a multiple of 48"),
        ({"page_tokens": 128}, "model.grid_tokens", "a multiple of 128"),
    ],
)
def test_what_cannot_be_served_is_refused_with_the_fix(
    wrong: dict[str, Any], key: str, fix: str
) -> None:
    with pytest.raises(ConfigError, match=fix) as error:
        check_tracking(**FINE | wrong)
    assert error.value.key == key
