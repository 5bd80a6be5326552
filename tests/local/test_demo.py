"""What counts as a demonstration that worked."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from stateferry.client import Completion, Timings
from stateferry.core.errors import ConfigError
from stateferry.demo import Outcome, find_problems, read_prompts, result
from stateferry.local.terminal import printable

TIMINGS = Timings(0.0, 0.0, 0.01, 0.02, 0.004, 1000, "ucx", 0.5, 0.6)
DONE = Completion("req-1", "length", 5, 11, 0, 0, 1, "", "prefill-0@1", "decode-0@1", TIMINGS)


def outcome(ttft_s: float = 0.1, **changes: object) -> Outcome:
    timings = dataclasses.replace(TIMINGS, **changes)  # type: ignore[arg-type]
    return Outcome(ttft_s, dataclasses.replace(DONE, timings=timings))


def test_the_result_is_made_of_medians() -> None:
    outcomes = [
        outcome(0.1, handoff_s=0.1, handoff_bytes=10, decode_s=1.0),
        outcome(0.3, handoff_s=0.2, handoff_bytes=20, decode_s=2.0),
        outcome(0.2, handoff_s=0.9, handoff_bytes=90, decode_s=5.0),
    ]
    assert json.loads(json.dumps(result(outcomes))) == {
        "prompts": 3,
        "ttft_s": 0.2,
        "tokens_per_s": 5.0,
        "handoff_bytes": 20,
        "handoff_ms": 200.0,
        "transport": "ucx",
    }
    assert not find_problems(outcomes)


@pytest.mark.parametrize(
    "bad",
    [
        outcome(transport="inproc"),
        outcome(transport=""),
        outcome(handoff_bytes=0),
        Outcome(0.0, None, "UNAVAILABLE: gone"),
    ],
)
def test_anything_less_fails(bad: Outcome) -> None:
    (problem,) = find_problems([outcome(), bad])
    assert problem.startswith("prompt 2: ")


def test_no_prompt_is_a_failure() -> None:
    assert find_problems([])
    assert result([])["prompts"] == 0


def test_prompts_come_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("one\n\n  two\n", encoding="utf-8")
    assert read_prompts(file) == ("one", "  two")
    file.write_text("\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="holds no prompt"):
        read_prompts(file)


def test_control_characters_do_not_reach_a_terminal() -> None:
    assert printable("a\tb\nc\x1b[31m\x00\x9b") == "a\tb\nc\ufffd[31m\ufffd\ufffd"
