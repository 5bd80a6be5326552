"""Encoding of manifests: whatever arrives, it is the manifest that was sent or a FrameError."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from stateferry.core.errors import FrameError, InvariantViolation
from stateferry.core.ids import WorkerKey
from stateferry.transfer.blocking import copy_with_crc32c
from stateferry.transfer.manifest import (
    MAX_SEGMENTS,
    Manifest,
    Segment,
    SegmentKind,
    SegmentSpec,
    decode_manifest,
    encode_manifest,
    segment_from_pieces,
    segment_from_tensor,
    segment_offsets,
)

SPEC = SegmentSpec(SegmentKind.SSM_STATE, 3, "float32", (2, 3, 4), 96, 0xDEADBEEF)
MANIFEST = Manifest(
    "req-1/0123456789abcdef",
    2,
    WorkerKey("prefill-0", 2**63 - 1),
    WorkerKey("decode-0", 1),
    b"opaque\x00bytes",
    (SPEC, SegmentSpec(SegmentKind.TAIL_X, 3, "bfloat16", (0, 7), 0, 0)),
)


def test_round_trip() -> None:
    assert decode_manifest(encode_manifest(MANIFEST)) == MANIFEST


def test_largest_manifest_fits_in_a_control_message() -> None:
    from stateferry.transfer.frames import Frame, FrameType, decode_frame, encode_frame
    from stateferry.transfer.manifest import MAX_DIMS, PAYLOAD_MAX_BYTES

    shape = (1,) * MAX_DIMS
    specs = tuple(
        SegmentSpec(SegmentKind.SSM_STATE, layer, "uint8", shape, 1, layer)
        for layer in range(MAX_SEGMENTS)
    )
    worker = WorkerKey("w" * 256, 2**64 - 1)
    payload = bytes(PAYLOAD_MAX_BYTES)
    manifest = Manifest("r" * 200, 2**32 - 1, worker, worker, payload, specs)
    frame = Frame(FrameType.PUSH, 1, encode_manifest(manifest))
    assert decode_manifest(decode_frame(memoryview(encode_frame(frame))).body) == manifest


@pytest.mark.parametrize(
    "changes",
    [
        {"request_id": "a b"},
        {"request_id": ""},
        {"request_id": "line\nbreak"},
        {"request_id": "\u00e4"},
        {"request_id": "r" * 201},
        {"epoch": -1},
        {"epoch": 2**32},
        {"payload": bytes((16 << 10) + 1)},
        {"sender": WorkerKey("x" * 257, 1)},
        {"sender": WorkerKey("x", -1)},
        {"segments": ()},
        {"segments": (replace(SPEC, shape=(0,), size_bytes=0),)},
        {"segments": (SPEC, SPEC)},
        {"segments": (replace(SPEC, size_bytes=95),)},
        {"segments": (replace(SPEC, layer=0xFFFF),)},
        {"segments": (replace(SPEC, layer=-1),)},
        {"segments": (replace(SPEC, shape=(1,) * 7, size_bytes=4),)},
        {"segments": (replace(SPEC, shape=(2**20, 2**20), size_bytes=2**42),)},
        {"segments": tuple(replace(SPEC, layer=n) for n in range(MAX_SEGMENTS + 1))},
    ],
)
def test_sender_refuses_what_the_receiver_would(changes: dict[str, object]) -> None:
    with pytest.raises(FrameError):
        encode_manifest(replace(MANIFEST, **changes))  # type: ignore[arg-type]


def test_overflowing_shape_is_refused() -> None:
    body = encode_manifest(MANIFEST)
    dims = b"".join(n.to_bytes(8, "little") for n in (2, 3, 4))
    assert body.count(dims) == 1
    # 2**63 * 2 * 24 * 4 is a multiple of 2**64 in fixed-width arithmetic, here it is not.
    huge = b"".join(n.to_bytes(8, "little") for n in (2**63, 2, 24))
    with pytest.raises(FrameError, match="do not fit shape"):
        decode_manifest(body.replace(dims, huge))


def test_every_truncation_and_trailing_byte_is_refused() -> None:
    body = encode_manifest(MANIFEST)
    for end in range(len(body)):
        with pytest.raises(FrameError):
            decode_manifest(body[:end])
    with pytest.raises(FrameError, match="behind the end"):
        decode_manifest(body + b"\x00")


def test_mutated_bodies_decode_to_a_valid_manifest_or_a_frame_error() -> None:
    """Without the frame's checksum in front, as if it had collided."""
    rng = random.Random(20261123)
    body = encode_manifest(MANIFEST)
    refused = 0
    for _ in range(20_000):
        mutated = bytearray(body)
        for _ in range(rng.randint(1, 3)):
            mutated[rng.randrange(len(mutated))] = rng.choice((0, 255, rng.randrange(256)))
        try:
            manifest = decode_manifest(bytes(mutated))
        except FrameError:
            refused += 1
        else:
            assert encode_manifest(manifest) == mutated
    assert refused > 5000


def test_a_claimed_segment_count_allocates_nothing() -> None:
    body = encode_manifest(replace(MANIFEST, segments=(SPEC,)))
    at = len(body) - (1 + 2 + 1 + 1 + 3 * 8 + 8 + 4 + 4) - 4
    assert body[at : at + 4] == b"\x01\x00\x00\x00"
    with pytest.raises(FrameError, match="segments, at most"):
        decode_manifest(body[:at] + b"\xff\xff\xff\xff" + body[at + 4 :])


def test_segment_shares_memory_with_its_bfloat16_tensor() -> None:
    tensor = torch.randn(3, 5).bfloat16()
    segment = segment_from_tensor("tail_B", 1, tensor)
    assert (segment.dtype, segment.shape, segment.data.nbytes) == ("bfloat16", (3, 5), 30)
    segment.data[:] = 0
    assert not tensor.any()


def test_strided_memory_is_never_a_segment() -> None:
    with pytest.raises(InvariantViolation):
        segment_from_tensor("tail_x", 0, torch.zeros(3, 4).T)
    with pytest.raises(InvariantViolation):
        Segment(SegmentKind.TAIL_X, 0, "uint8", (4,), np.zeros(8, dtype=np.uint8)[::2])
    with pytest.raises(InvariantViolation):
        Segment(SegmentKind.TAIL_X, 0, "float32", (4,), np.zeros(4, dtype=np.uint8))


def test_segments_start_aligned_and_do_not_overlap() -> None:
    offsets, end = segment_offsets([1, 64, 0, 65, 3])
    assert offsets == [0, 64, 128, 128, 256]
    assert end == 259


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pieces_travel_back_to_back(dtype: torch.dtype) -> None:
    pages = torch.arange(5 * 2 * 6, dtype=torch.float32).to(dtype).view(5, 2, 6)
    chosen = [pages[3], pages[0], pages[4]]
    segment = segment_from_pieces("kv_pages", 1, (3, 2, 6), chosen)
    whole = segment_from_tensor("kv_pages", 1, pages[[3, 0, 4]])
    assert (segment.kind, segment.dtype, segment.shape) == (whole.kind, whole.dtype, whole.shape)
    target = np.zeros(segment.size_bytes, dtype=np.uint8)
    copy_with_crc32c(segment.runs, target)
    assert np.array_equal(target, whole.data) and segment.size_bytes == whole.size_bytes
    # Shared memory, no copy: what is written later is sent.
    pages[0].fill_(-1)
    copy_with_crc32c(segment.runs, target)
    assert not np.array_equal(target, whole.data)


def test_pieces_that_are_not_the_tensor_are_refused() -> None:
    page = torch.zeros(2, 6)
    for pieces in ([], [page, page.bfloat16()], [page, page.T], [page]):
        with pytest.raises(InvariantViolation, match="layer 0"):
            segment_from_pieces("kv_pages", 0, (2, 2, 6), pieces)
