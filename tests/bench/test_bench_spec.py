"""The speculation benchmark answers its tasks with drafts and without, to the same tokens, counts
states, and reports every key. No time is asserted."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from bench.spec import tasks as tasks_module
from bench.spec.__main__ import result_of
from bench.spec.duel import Contender, Duel, run_duels
from bench.spec.kernel_times import KernelRatio
from bench.spec.states_moved import states_moved
from bench.spec.tasks import HELD_OUT, OPEN, REPETITIVE, Task, tasks
from stateferry.bundled import bundled_model_dir
from stateferry.config import NO_SPECULATION, SpeculationSection

DRAFTS = SpeculationSection(drafter="ngram", draft_tokens=4)


@pytest.fixture(scope="module")
def todo() -> list[Task]:
    return tasks(bundled_model_dir(), None, 2, seed=3)


def test_tasks(todo: list[Task]) -> None:
    assert [task.name for task in todo] == [REPETITIVE, HELD_OUT, OPEN]
    assert todo == tasks(bundled_model_dir(), None, 2, seed=3)
    assert todo != tasks(bundled_model_dir(), None, 2, seed=4)
    [first, second] = todo[0].prompts
    assert first != second and len(set(pairwise(first))) < len(first) / 2


def test_a_text_that_is_too_short(tmp_path: Path) -> None:
    file = tmp_path / "short.txt"
    file.write_text("Nothing much.")
    with pytest.raises(ValueError, match="0 passages and 0 sentences"):
        tasks_module.tasks(bundled_model_dir(), file, 1, seed=0)


def test_duels_agree_and_states_are_counted(todo: list[Task]) -> None:
    on, off = (Contender.of(bundled_model_dir(), 2, 1, how) for how in (DRAFTS, NO_SPECULATION))
    shown: list[Duel] = []
    duels = run_duels(
        on, off, todo[:1], (1, 2), output_tokens=40, rounds=1, seed=1, show=shown.append
    )
    assert shown == duels and [duel.batch for duel in duels] == [1, 2]
    assert all(duel.mismatches == 0 and duel.on > 0 < duel.off for duel in duels)
    moved, rows = states_moved(on, todo[0].requests(1, 40, 1))
    assert 1 <= moved < 2 and 1 < rows <= 1 + DRAFTS.draft_tokens


def test_every_key_is_reported(tmp_path: Path) -> None:
    duels = [Duel(REPETITIVE, batch, 3.0, 2.0, 1.5 / batch, 0.9, 10, 0) for batch in (1, 8)]
    ratios = [KernelRatio(24, draft, 1.0, 2.0) for draft in ("chain 1", "tree 16")]
    result = result_of(duels, 1.04, ratios)
    assert result["speedup_b1_repetitive"] == 1.5 and result["worst_ratio"] == 0.188
    assert result["states_moved_per_verify"] == 1.04 and result["exact_mismatches"] == 0
    assert set(result) >= {"speedup_b8_repetitive", "acceptance", "kernel_time_ratio"}
    pytest.importorskip("matplotlib")
    from bench.spec.plot import plot

    plot(duels, ratios, "title", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
