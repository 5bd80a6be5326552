"""Which grid points of a prompt are kept."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stateferry.prefix.snapshot_plan import SnapshotPlan, plan_snapshots


def test_the_last_grid_point_and_the_tail_are_always_there() -> None:
    for prompt_len, last, rows in [(1, None, 1), (63, None, 63), (64, 64, 0), (200, 192, 8)]:
        plan = plan_snapshots(prompt_len, 0, 64, spare_slots=0)
        assert (plan.last, plan.tail_rows) == (last, rows)
        assert plan.boundaries == ((last,) if last else ())


def test_a_grid_point_that_was_resumed_is_not_written_again() -> None:
    assert plan_snapshots(200, 192, 64, spare_slots=9).boundaries == ()
    assert plan_snapshots(200, 195, 64, spare_slots=9).boundaries == ()
    assert plan_snapshots(200, 191, 64, spare_slots=9).boundaries == (192,)


def test_hints_are_rounded_down_and_those_outside_are_ignored() -> None:
    plan = plan_snapshots(400, 64, 64, spare_slots=9, hints=[3, 64, 127, 129, 191, 300, 500, -9])
    assert plan.optional == (128, 256) and plan.last == 384 and plan.num_skipped == 0


def test_when_slots_are_short_the_branch_comes_first_then_deep_hints_then_the_interval() -> None:
    wish = dict(branch_position=128, hints=[200, 600], interval=256)
    kept = [
        plan_snapshots(1000, 0, 64, spare_slots=spare, **wish).optional  # type: ignore[arg-type]
        for spare in range(7)
    ]
    assert kept == [
        (),
        (128,),
        (128, 576),
        (128, 192, 576),
        (128, 192, 576, 768),
        (128, 192, 512, 576, 768),
        (128, 192, 256, 512, 576, 768),
    ]
    plan = plan_snapshots(1000, 0, 64, spare_slots=2, **wish)  # type: ignore[arg-type]
    assert plan.num_skipped == 4 and plan.last == 960


def test_closer_ones_where_nothing_has_to_go_for_them() -> None:
    def plan(spare: int, free: int) -> SnapshotPlan:
        return plan_snapshots(
            1000, 128, 64, spare_slots=spare, interval=512, free_slots=free, free_interval=128
        )

    assert plan(9, 0).optional == (512,)
    # One of those that are free goes to what is wanted in any case.
    assert plan(9, 1).optional == (512,) and plan(9, 2).optional == (512, 896)
    assert plan(9, 9).optional == (256, 384, 512, 640, 768, 896)
    assert plan(3, 9).optional == (512, 768, 896)
    assert plan(0, 9).optional == () and plan(0, 9).num_skipped == 1
    assert all(plan(9, free).num_skipped == 0 for free in range(9))


def test_what_an_extend_passes() -> None:
    plan = plan_snapshots(1000, 0, 64, spare_slots=9, interval=256)
    assert plan.boundaries == (256, 512, 768, 960)
    assert plan.within(256, 512) == (512,) and plan.within(0, 256) == (256,)
    assert plan.within(256, 511) == () and plan.within(700, 1000) == (768, 960)


@pytest.mark.parametrize(
    "wrong", [{"branch_position": 65}, {"interval": 96}, {"free_interval": 96}]
)
def test_what_is_off_the_grid_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="grid"):
        plan_snapshots(1000, 0, 64, spare_slots=9, **wrong)


@given(
    prompt_len=st.integers(1, 500),
    resumed=st.integers(0, 499),
    grid=st.sampled_from((4, 16, 64)),
    spare=st.integers(-2, 9),
    hints=st.lists(st.integers(-5, 600), max_size=6),
    branch=st.none() | st.integers(0, 100),
    times=st.integers(0, 4),
)
def test_every_plan_can_be_written(
    prompt_len: int,
    resumed: int,
    grid: int,
    spare: int,
    hints: list[int],
    branch: int | None,
    times: int,
) -> None:
    """Ascending grid points inside what is computed, no more than there are slots for."""
    prefix_len = min(resumed, prompt_len - 1)
    plan = plan_snapshots(
        prompt_len,
        prefix_len,
        grid,
        spare_slots=spare,
        branch_position=None if branch is None else branch * grid,
        hints=hints,
        interval=times * grid,
    )
    points = plan.boundaries
    assert list(points) == sorted(set(points))
    assert all(p % grid == 0 and prefix_len < p <= prompt_len for p in points)
    assert len(plan.optional) <= max(spare, 0)
    passed = prompt_len // grid * grid
    assert plan.last == (passed if passed > prefix_len else None)
    assert passed + plan.tail_rows == prompt_len and 0 <= plan.tail_rows < grid
