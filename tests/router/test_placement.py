"""Which workers a request gets."""

from __future__ import annotations

import dataclasses
from collections import Counter

from router.fakes import FINGERPRINT, description
from stateferry.core.errors import InvalidRequest, NoWorker
from stateferry.core.fingerprint import Fingerprint
from stateferry.core.ids import Role
from stateferry.router.membership import WorkerView
from stateferry.router.placement import Need, place, what_is_missing

NEED = Need(prompt_len=10, total_tokens=20, needs_decode=True)
ONE_TOKEN = Need(prompt_len=10, total_tokens=11, needs_decode=False)
OTHER = dataclasses.replace(FINGERPRINT, weights="other")


def view(
    role: Role,
    number: int,
    *,
    requests: int = 0,
    tokens: int = 0,
    capacity: int = 4,
    context: int = 4096,
    fingerprint: Fingerprint = FINGERPRINT,
    kv_pages: int = 0,
    busy_kv_pages: int = 0,
) -> WorkerView:
    worker = description(
        role,
        f"{role.value}-{number}",
        capacity=capacity,
        max_context_tokens=context,
        fingerprint=fingerprint,
        kv_pages=kv_pages,
    )
    return WorkerView(worker, None, requests, requests, tokens, busy_kv_pages, 0.0)


def prefill(number: int, **values: object) -> WorkerView:
    return view(Role.PREFILL, number, **values)  # type: ignore[arg-type]


def decode(number: int, **values: object) -> WorkerView:
    return view(Role.DECODE, number, **values)  # type: ignore[arg-type]


def ids(prefills: list[WorkerView], decodes: list[WorkerView], need: Need = NEED) -> object:
    found = {
        (p.prefill.key.worker_id, p.decode and p.decode.key.worker_id)
        for p in (place(prefills, decodes, need, turn) for turn in range(6))
        if p is not None
    }
    return sorted(found, key=str)


def test_prefill_goes_by_tokens_and_decode_by_requests() -> None:
    prefills = [prefill(0, requests=1, tokens=500), prefill(1, requests=3, tokens=40)]
    decodes = [decode(0, requests=2), decode(1, requests=1, tokens=9999)]
    assert ids(prefills, decodes) == [("prefill-1", "decode-1")]


def test_decode_load_is_relative_to_capacity() -> None:
    decodes = [decode(0, requests=2, capacity=4), decode(1, requests=3, capacity=32)]
    assert ids([prefill(0)], decodes) == [("prefill-0", "decode-1")]


def test_full_workers_get_nothing() -> None:
    assert ids([prefill(0)], [decode(0, requests=4), decode(1, requests=3)]) == [
        ("prefill-0", "decode-1")
    ]
    assert place([prefill(0, requests=4)], [decode(0)], NEED, 0) is None
    assert place([prefill(0)], [decode(0, requests=4)], NEED, 0) is None
    # Busy is a reason to wait, not to give up.
    assert what_is_missing([prefill(0, requests=4)], [decode(0)], NEED) is None


def test_different_fingerprints_never_pair() -> None:
    assert place([prefill(0)], [decode(0, fingerprint=OTHER)], NEED, 0) is None
    # The least-loaded decode worker is useless to the only prefill worker with room.
    prefills = [prefill(0, requests=4), prefill(1, tokens=5, fingerprint=OTHER)]
    decodes = [decode(0), decode(1, requests=3, fingerprint=OTHER)]
    assert ids(prefills, decodes) == [("prefill-1", "decode-1")]


def test_equally_loaded_workers_take_turns() -> None:
    prefills, decodes = [prefill(n) for n in range(3)], [decode(n) for n in range(2)]
    placed = [place(prefills, decodes, NEED, turn) for turn in range(60)]
    assert set(Counter(p.prefill.key for p in placed if p).values()) == {20}
    assert set(Counter(p.decode.key for p in placed if p and p.decode).values()) == {30}
    # Same input, same answer.
    assert placed == [place(prefills, decodes, NEED, turn) for turn in range(60)]


def test_one_token_needs_no_decode_worker() -> None:
    assert ids([prefill(0)], [], ONE_TOKEN) == [("prefill-0", None)]
    assert what_is_missing([prefill(0)], [], ONE_TOKEN) is None


def test_a_worker_with_a_short_context_is_passed_over() -> None:
    decodes = [decode(0, context=19), decode(1, requests=3, context=20)]
    assert ids([prefill(0)], decodes) == [("prefill-0", "decode-1")]


def test_what_is_missing_is_named() -> None:
    assert "prefill" in str(what_is_missing([], [decode(0)], NEED))
    assert "decode" in str(what_is_missing([prefill(0)], [], NEED))
    unequal = what_is_missing([prefill(0)], [decode(0, fingerprint=OTHER)], NEED)
    assert isinstance(unequal, NoWorker) and "fingerprints" in str(unequal)
    assert what_is_missing([prefill(0)], [decode(0)], NEED) is None


def test_what_no_worker_can_ever_hold_is_the_clients_fault() -> None:
    for prefills, decodes in (
        ([prefill(0)], [decode(0, context=19), decode(1, context=18)]),
        ([prefill(0, context=19)], [decode(0)]),
    ):
        error = what_is_missing(prefills, decodes, NEED)
        assert isinstance(error, InvalidRequest) and error.field == "stop.max_tokens"
        assert "20" in str(error) and "19 tokens" in str(error)


def test_kv_pages_are_room_too() -> None:
    """20 tokens are two pages of 16 on decode; their prompt of 10 is one on prefill."""
    full = decode(0, kv_pages=8, busy_kv_pages=7)
    roomy = decode(1, requests=3, kv_pages=8, busy_kv_pages=6)
    assert ids([prefill(0)], [full, roomy]) == [("prefill-0", "decode-1")]
    assert place([prefill(0)], [full], NEED, 0) is None
    assert what_is_missing([prefill(0)], [full], NEED) is None
    # A model without attention is never short of pages.
    assert ids([prefill(0)], [decode(0)]) == [("prefill-0", "decode-0")]


def test_a_prefill_worker_holds_the_prompt_alone() -> None:
    assert ids([prefill(0, kv_pages=8, busy_kv_pages=7)], [decode(0)])
    assert not ids([prefill(0, kv_pages=8, busy_kv_pages=8)], [decode(0)])


def test_the_decode_worker_of_the_last_turn_comes_first() -> None:
    decodes = [decode(0), decode(1, requests=1), decode(2, requests=2)]
    last = [dataclasses.replace(NEED, last_decode=d.description.key) for d in decodes]
    assert ids([prefill(0)], decodes, last[0]) == [("prefill-0", "decode-0")]
    assert ids([prefill(0)], decodes, last[1]) == [("prefill-0", "decode-1")]
    # Half of its places are taken, and all of another's are free.
    assert ids([prefill(0)], decodes, last[2]) == [("prefill-0", "decode-0")]


def test_but_not_where_it_cannot_serve() -> None:
    for other in (
        decode(1, capacity=0),
        decode(1, context=15),
        decode(1, fingerprint=OTHER),
        decode(1, kv_pages=2, busy_kv_pages=1),
    ):
        need = dataclasses.replace(NEED, last_decode=other.description.key)
        assert ids([prefill(0)], [decode(0, requests=1), other], need) == [
            ("prefill-0", "decode-0")
        ]
    gone = dataclasses.replace(NEED, last_decode=decode(7).description.key)
    assert ids([prefill(0)], [decode(0)], gone) == [("prefill-0", "decode-0")]


def test_a_sessions_prefill_worker_is_worth_half_a_prompt_of_queue() -> None:
    session = dataclasses.replace(NEED, prompt_len=100, last_prefill=prefill(1).description.key)
    for busy, wanted in ((0, "prefill-1"), (50, "prefill-1"), (51, "prefill-0")):
        prefills = [prefill(0), prefill(1, tokens=busy)]
        for need in (session, dataclasses.replace(session, needs_decode=False)):
            chosen = {
                p.prefill.key.worker_id
                for turn in range(4)
                if (p := place(prefills, [decode(0)], need, turn)) is not None
            }
            assert wanted in chosen and (busy == 0 or len(chosen) == 1)
    # One that is full, or another life of it, is none.
    full = [prefill(0, tokens=9), prefill(1, requests=4)]
    assert ids(full, [decode(0)], session) == [("prefill-0", "decode-0")]
