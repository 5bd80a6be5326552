"""Who computed the last turn of a conversation."""

from __future__ import annotations

from stateferry.core.ids import WorkerKey
from stateferry.router.last_turns import NOBODY, LastTurn, LastTurns

A, B = WorkerKey("decode-0", 1), WorkerKey("decode-1", 1)
TURN = tuple(range(100))


def test_the_next_turn_finds_it() -> None:
    turns = LastTurns()
    turns.note("t/", TURN, A)
    assert turns.worker_of("t/", (*TURN, 7, 7, 7)) == A
    assert turns.worker_of("t/", TURN) == A
    turns.note("t/", (*TURN, *range(50)), B)
    assert turns.worker_of("t/", (*TURN, *range(50), 7)) == B


def test_an_end_in_other_tokens_is_found_as_well() -> None:
    turns = LastTurns()
    turns.note("t/", TURN, A)
    assert turns.worker_of("t/", (*TURN[:70], *[7] * 90)) == A
    assert turns.worker_of("t/", (*TURN[:60], *[7] * 90)) is None


def test_others_do_not() -> None:
    turns = LastTurns()
    turns.note("t/", TURN, A)
    assert turns.worker_of("t/x", TURN) is None
    assert turns.worker_of("t/", (7, *TURN)) is None
    assert turns.worker_of("t/", TURN[:5]) is None
    assert turns.worker_of("t/", ()) is None


def test_the_oldest_are_forgotten() -> None:
    turns = LastTurns(most=4)
    for first in range(3):
        turns.note("", (first, *TURN), A)
    assert turns.worker_of("", (0, *TURN)) is None
    assert turns.worker_of("", (1, *TURN)) == turns.worker_of("", (2, *TURN)) == A


def test_a_session_is_known_by_its_name_alone() -> None:
    turns, prefill = LastTurns(), WorkerKey("prefill-0", 1)
    turns.note("t/", TURN, B)
    turns.note_session("t/", "chat", LastTurn(prefill, A))
    assert turns.of("t/", "chat", TURN) == LastTurn(prefill, A)
    assert turns.of("t/", "other", TURN) == LastTurn(None, B) == turns.of("t/", "", TURN)
    assert turns.of("u/", "chat", TURN) == NOBODY
    # A turn that ran at its decode worker leaves the prefill worker what it was.
    turns.note_session("t/", "chat", LastTurn(None, B))
    assert turns.of("t/", "chat", (1,)) == LastTurn(prefill, B)


def test_the_oldest_session_is_forgotten() -> None:
    turns = LastTurns(most=2)
    for name in ("a", "b", "a", "c"):
        turns.note_session("t/", name, LastTurn(decode=A))
    assert turns.of("t/", "b", ()) == NOBODY
    assert turns.of("t/", "a", ()) == turns.of("t/", "c", ()) == LastTurn(decode=A)
