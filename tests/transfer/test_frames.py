"""Control messages: a damaged one is a FrameError, nothing else."""

from __future__ import annotations

import random

import pytest

from stateferry.core.errors import FrameError
from stateferry.core.fingerprint import Fingerprint
from stateferry.core.ids import WorkerKey
from stateferry.transfer.frames import (
    CONTROL_MAX_BYTES,
    Frame,
    FrameType,
    Hello,
    RefusedHello,
    RejectReason,
    decode_frame,
    decode_hello,
    decode_reason,
    decode_refused,
    encode_frame,
    encode_hello,
    encode_reason,
    encode_refused,
)

HELLO = Hello(
    WorkerKey("prefill-0", 5),
    WorkerKey("decode-0", 6),
    Fingerprint(1, "m", "w", "l", 64, "bf16", "cpu"),
)


@pytest.mark.parametrize("frame_type", FrameType)
def test_round_trip_in_a_longer_buffer(frame_type: FrameType) -> None:
    frame = Frame(frame_type, 0xFFFFFFFF, b"body")
    buffer = encode_frame(frame) + b"left over from an older message"
    assert decode_frame(memoryview(buffer)) == frame


def test_hello_refused_and_reasons_round_trip() -> None:
    assert decode_hello(encode_hello(HELLO)) == HELLO
    refused = RefusedHello("layout", "1a2b")
    assert decode_refused(encode_refused(refused)) == refused
    for reason in RejectReason:
        assert decode_reason(encode_reason(reason)) is reason


def test_a_long_explanation_is_cut_between_characters() -> None:
    cut = decode_refused(encode_refused(RefusedHello("model", "x" + "\u00e4" * 500)))
    assert cut.theirs == "x" + "\u00e4" * 127


@pytest.mark.parametrize("body", [b"", b"\xff", b"\x00\x00"])
def test_unknown_reasons_are_refused(body: bytes) -> None:
    with pytest.raises(FrameError):
        decode_reason(body)


def test_every_single_bit_flip_is_refused() -> None:
    message = encode_frame(Frame(FrameType.HELLO, 0, encode_hello(HELLO)))
    for bit in range(len(message) * 8):
        flipped = bytearray(message)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(FrameError):
            decode_frame(memoryview(flipped))


def test_garbage_is_refused() -> None:
    rng = random.Random(7)
    for _ in range(5000):
        garbage = rng.randbytes(rng.randrange(200))
        with pytest.raises(FrameError):
            decode_frame(memoryview(rng.choice((b"", b"SFHO")) + garbage))


def test_a_claimed_length_is_refused_before_it_is_used() -> None:
    message = bytearray(encode_frame(Frame(FrameType.HELLO, 0, b"body")) + bytes(1000))
    for claimed in (1005, 0xFFFFFFFF):
        message[12:16] = claimed.to_bytes(4, "little")
        with pytest.raises(FrameError, match="claims a body"):
            decode_frame(memoryview(message))


def test_mutated_hello_bodies_raise_nothing_but_frame_error() -> None:
    rng = random.Random(8)
    body = encode_hello(HELLO)
    refused = 0
    for _ in range(5000):
        mutated = bytearray(body)
        mutated[rng.randrange(len(body))] = rng.randrange(256)
        try:
            decode_hello(bytes(mutated[: rng.randint(0, len(body))]))
        except FrameError:
            refused += 1
    assert refused > 4000


def test_oversized_control_messages_are_not_made() -> None:
    with pytest.raises(FrameError):
        encode_frame(Frame(FrameType.PUSH, 0, bytes(CONTROL_MAX_BYTES)))
