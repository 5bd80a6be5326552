"""Tickets: what was signed is what opens, once, for the worker named in it."""

from __future__ import annotations

import dataclasses

import pytest

from stateferry.core.cluster_key import ClusterKey
from stateferry.core.errors import ConfigError, TicketError
from stateferry.core.ids import Role, WorkerKey
from stateferry.core.ticket import CLOCK_SKEW_S, Ticket, TicketDesk, TicketSigner

PREFILL = WorkerKey("prefill-0", 7)
DECODE = WorkerKey("decode-0", 9)
KEY = ClusterKey(b"0123456789abcdef")


class FakeClock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic_s(self) -> float:
        return self.now_s

    def wall_s(self) -> float:
        return self.now_s


def ticket(**changes: object) -> Ticket:
    base = Ticket(
        request_id="r1",
        epoch=1,
        tenant="",
        prefill=PREFILL,
        decode=DECODE,
        transfer_address="127.0.0.1:1",
        prompt_len=5,
        max_tokens=9,
        expires_at_s=1030.0,
    )
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def desk(role: Role = Role.DECODE, me: WorkerKey = DECODE) -> tuple[TicketDesk, FakeClock]:
    clock = FakeClock()
    return TicketDesk(TicketSigner(KEY), role, me, clock), clock


@pytest.mark.parametrize(
    "body",
    [
        ticket(cache_salt="t/é", priority=-7, session="chat"),
        ticket(decode=None, transfer_address=None),
        # The longest names that a client can give: the JSON of a control character is six bytes.
        ticket(
            request_id="r" * 128,
            tenant="t" * 128,
            cache_salt="t" * 128 + "/" + "\x01" * 256,
            session="s" * 128,
        ),
    ],
)
def test_opens_to_what_was_signed(body: Ticket) -> None:
    signer = TicketSigner(KEY)
    assert signer.open(signer.sign(body)) == body


def test_every_flipped_bit_is_refused() -> None:
    signer = TicketSigner(KEY)
    blob = signer.sign(ticket())
    for position in range(len(blob) * 8):
        forged = bytearray(blob)
        forged[position // 8] ^= 1 << position % 8
        with pytest.raises(TicketError):
            signer.open(bytes(forged))


@pytest.mark.parametrize("blob", [b"", b"\x01", b"\x01" + bytes(32), bytes(10_000)])
def test_garbage_is_refused(blob: bytes) -> None:
    with pytest.raises(TicketError):
        TicketSigner(KEY).open(blob)


def test_another_key_is_refused() -> None:
    with pytest.raises(TicketError, match="signature"):
        TicketSigner(ClusterKey(b"another key of 16")).open(TicketSigner(KEY).sign(ticket()))


def test_short_key_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"cluster\.key"):
        ClusterKey(b"short")


def test_admitted_once() -> None:
    counter, _ = desk()
    blob = TicketSigner(KEY).sign(ticket())
    assert counter.admit(blob).request_id == "r1"
    with pytest.raises(TicketError, match="used"):
        counter.admit(blob)


def test_expired_after_skew() -> None:
    counter, clock = desk()
    clock.now_s = 1030.0 + CLOCK_SKEW_S - 1
    assert counter.admit(TicketSigner(KEY).sign(ticket()))
    clock.now_s += 2
    with pytest.raises(TicketError, match="expired"):
        counter.admit(TicketSigner(KEY).sign(ticket()))


@pytest.mark.parametrize(
    ("role", "me"),
    [
        (Role.DECODE, WorkerKey("decode-0", 10)),
        (Role.DECODE, PREFILL),
        (Role.PREFILL, DECODE),
    ],
)
def test_meant_for_another_life_or_worker(role: Role, me: WorkerKey) -> None:
    counter, _ = desk(role, me)
    with pytest.raises(TicketError, match="is for"):
        counter.admit(TicketSigner(KEY).sign(ticket()))


def test_used_nonces_are_forgotten_after_expiry() -> None:
    counter, clock = desk()
    for number in range(50):
        clock.now_s = 1000.0 + 100 * number
        counter.admit(TicketSigner(KEY).sign(ticket(expires_at_s=clock.now_s + 30)))
    assert len(counter._used) == 1
