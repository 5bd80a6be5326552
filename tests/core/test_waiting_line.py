"""Who is next: against a sorted list, whatever comes and goes."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stateferry.core.waiting_line import WaitingLine


def test_priority_first_then_arrival() -> None:
    line: WaitingLine[str] = WaitingLine()
    for name, priority in (("a", 0), ("b", 2), ("c", -1), ("d", 2), ("e", 0)):
        line.add(name, priority, since_s=0.0)
    assert line.in_order(1e9) == ["b", "d", "a", "e", "c"]
    served = []
    while (name := line.first(1e9)) is not None:
        served.append(name)
        line.remove(name)
    assert served == ["b", "d", "a", "e", "c"] and not len(line)


def test_who_has_waited_too_long_is_next_and_the_longest_wait_first() -> None:
    line: WaitingLine[str] = WaitingLine(starvation_s=10)
    line.add("low", -5, since_s=0.0)
    line.add("middle", 0, since_s=1.0)
    line.add("high", 5, since_s=2.0)
    assert line.first(9.9) == "high"
    assert line.first(10.0) == "low" and line.highest() == "high"
    assert line.in_order(10.5) == ["low", "high", "middle"]
    assert line.in_order(11.0) == ["low", "middle", "high"]
    assert line.in_order(99.0) == ["low", "middle", "high"]


def test_whether_a_newcomer_would_be_next() -> None:
    line: WaitingLine[str] = WaitingLine(starvation_s=10)
    assert not line.anyone_before(-100, 0.0)
    line.add("a", 1, since_s=0.0)
    assert line.anyone_before(1, 9.0) and not line.anyone_before(2, 9.0)
    assert line.anyone_before(100, 10.0), "it has waited for too long to be overtaken"


def test_who_has_waited_before_comes_earlier_than_it_was_added() -> None:
    line: WaitingLine[str] = WaitingLine()
    line.add("a", 0, since_s=5.0)
    line.add("again", 0, since_s=2.0)
    assert line.in_order(6.0) == ["again", "a"]


def test_removing_what_does_not_wait_is_an_error() -> None:
    line: WaitingLine[str] = WaitingLine()
    with pytest.raises(KeyError):
        line.remove("a")


@given(
    st.lists(st.tuples(st.integers(-3, 3), st.integers(0, 20), st.booleans()), max_size=40),
    st.integers(0, 40),
    st.sampled_from((3.0, 12.0, math.inf)),
)
def test_it_is_a_sorted_list(
    arrivals: list[tuple[int, int, bool]], now: int, starvation_s: float
) -> None:
    line: WaitingLine[int] = WaitingLine(starvation_s)
    places: list[tuple[int, int, int]] = []
    for number, (priority, since, leaves) in enumerate(arrivals):
        line.add(number, priority, float(since))
        places.append((priority, since, number))
        if leaves:
            gone = places.pop(len(places) // 2)
            line.remove(gone[2])

    def rank(place: tuple[int, int, int]) -> tuple[float, int, int]:
        priority, since, number = place
        return -math.inf if now - since >= starvation_s else -priority, since, number

    wanted = [number for _, _, number in sorted(places, key=rank)]
    assert line.in_order(float(now)) == wanted and len(line) == len(wanted)
    assert line.first(float(now)) == (wanted[0] if wanted else None)
    top = [p for p in places if p[0] == max(q[0] for q in places)]
    assert line.highest() == (min(top, key=lambda p: p[1:])[2] if top else None)
    assert set(line) == set(wanted) and all(number in line for number in wanted)
