"""What one hand-off consists of: its segments, whose it is, and the encoding of that list.

The segments travel back to back in one run of bytes, each starting at a multiple of
``SEGMENT_ALIGN_BYTES``. Both sides compute the same offsets from the manifest.
"""

from __future__ import annotations

import enum
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from stateferry.core.errors import FrameError, InvariantViolation
from stateferry.core.ids import WorkerKey
from stateferry.transfer.blocking import Bytes
from stateferry.transfer.protocol.receiving import PartHeader
from stateferry.transfer.wire import BodyReader, BodyWriter

PAYLOAD_MAX_BYTES = 16 << 10
MAX_SEGMENTS = 1024
MAX_DIMS = 6
MAX_TOTAL_BYTES = 1 << 40
SEGMENT_ALIGN_BYTES = 64
_MANIFEST_VERSION = 2
_NO_LAYER = 0xFFFF
# Workers key their books by attempt: a client's id and a nonce. Opaque here, but may be logged.
_REQUEST_ID = re.compile(r"[!-~]{1,200}")

# Codes on the wire are positions in these tables: append only.
_DTYPES = {
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "float64": 8,
    "uint8": 1,
    "int8": 1,
    "int32": 4,
    "int64": 8,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
}


class SegmentKind(enum.Enum):
    """What a segment is to the two workers; no more than a label here. Append only."""

    SSM_STATE = "ssm_state"
    CONV_STATE = "conv_state"
    TAIL_XBC = "tail_xBC"
    TAIL_X = "tail_x"
    TAIL_B = "tail_B"
    TAIL_DT = "tail_dt"
    HIDDEN = "hidden"
    KV_PAGES = "kv_pages"
    KV_ROWS = "kv_rows"


_KIND_CODES = {kind: code for code, kind in enumerate(SegmentKind)}
_KINDS = tuple(SegmentKind)
_DTYPE_CODES = {name: code for code, name in enumerate(_DTYPES)}
_DTYPE_NAMES = tuple(_DTYPES)


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """A labelled piece of memory: ``data`` is a contiguous, one-dimensional view of its bytes.

    ``start``: where it begins along its first dimension, when the whole comes in several parts.
    """

    kind: SegmentKind
    layer: int
    dtype: str
    shape: tuple[int, ...]
    data: Bytes
    start: int = 0

    def __post_init__(self) -> None:
        _check_flat(self.data, f"{self.kind}, layer {self.layer}")
        if self.data.nbytes != _size_bytes(self.dtype, self.shape):
            raise InvariantViolation(f"{self.kind}, layer {self.layer}: size and shape disagree")

    @property
    def size_bytes(self) -> int:
        return self.data.nbytes

    @property
    def runs(self) -> tuple[Bytes, ...]:
        """Where the bytes lie, in order."""
        return (self.data,)


@dataclass(frozen=True, slots=True, eq=False)
class ScatteredSegment:
    """Like Segment, for the sending side alone: its bytes lie in ``pieces``, in this order."""

    kind: SegmentKind
    layer: int
    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Bytes, ...]
    start: int = 0

    def __post_init__(self) -> None:
        for piece in self.pieces:
            _check_flat(piece, f"{self.kind}, layer {self.layer}")
        if self.size_bytes != _size_bytes(self.dtype, self.shape):
            raise InvariantViolation(f"{self.kind}, layer {self.layer}: size and shape disagree")

    @property
    def size_bytes(self) -> int:
        return sum(piece.nbytes for piece in self.pieces)

    @property
    def runs(self) -> tuple[Bytes, ...]:
        """Where the bytes lie, in order."""
        return self.pieces


OutgoingSegment = Segment | ScatteredSegment


@dataclass(frozen=True, slots=True)
class SegmentSpec:
    """A segment without its bytes, and the CRC-32C they must have."""

    kind: SegmentKind
    layer: int
    dtype: str
    shape: tuple[int, ...]
    size_bytes: int
    crc32c: int
    start: int = 0


@dataclass(frozen=True, slots=True)
class Manifest:
    """One part of a hand-off. ``payload`` is opaque; at most PAYLOAD_MAX_BYTES."""

    request_id: str
    epoch: int
    sender: WorkerKey
    receiver: WorkerKey
    payload: bytes
    segments: tuple[SegmentSpec, ...]
    part: int = 0
    is_last: bool = True

    @property
    def header(self) -> PartHeader:
        return PartHeader(
            self.request_id,
            self.epoch,
            self.sender,
            self.receiver,
            self.part,
            self.is_last,
            self.size_bytes,
        )

    @property
    def size_bytes(self) -> int:
        """Bytes of all segments, without the gaps that align them."""
        return sum(spec.size_bytes for spec in self.segments)


def segment_from_tensor(
    kind: SegmentKind | str, layer: int, tensor: torch.Tensor, start: int = 0
) -> Segment:
    """A segment that shares ``tensor``'s memory. ``kind`` may be given by its name.

    The tensor must be contiguous and on the CPU. Raises InvariantViolation if not.
    """
    data = bytes_of(tensor, f"{kind}, layer {layer}")
    dtype, shape = dtype_name(tensor.dtype), tuple(tensor.shape)
    return Segment(SegmentKind(kind), layer, dtype, shape, data, start)


def segment_from_pieces(
    kind: SegmentKind | str,
    layer: int,
    shape: tuple[int, ...],
    pieces: Sequence[torch.Tensor],
    start: int = 0,
) -> ScatteredSegment:
    """A tensor of ``shape`` that lies in ``pieces``, whose memory is shared: one or more, of one
    dtype, each as ``segment_from_tensor`` wants them. Raises InvariantViolation if not."""
    label = f"{kind}, layer {layer}"
    dtypes = {piece.dtype for piece in pieces}
    if len(dtypes) != 1:
        raise InvariantViolation(f"{label}: pieces of {len(dtypes)} dtypes")
    return ScatteredSegment(
        kind=SegmentKind(kind),
        layer=layer,
        dtype=dtype_name(dtypes.pop()),
        shape=shape,
        pieces=tuple(bytes_of(piece, label) for piece in pieces),
        start=start,
    )


def bytes_of(tensor: torch.Tensor, label: str) -> Bytes:
    """The memory of a contiguous CPU tensor. Raises InvariantViolation for any other."""
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise InvariantViolation(f"{label}: not a contiguous CPU tensor")
    # bfloat16 has no numpy type; bytes have.
    return tensor.detach().reshape(-1).view(torch.uint8).numpy()


def dtype_name(dtype: torch.dtype) -> str:
    """Its name in a manifest."""
    return str(dtype).removeprefix("torch.")


def segment_offsets(sizes_bytes: Sequence[int]) -> tuple[list[int], int]:
    """Where each segment starts in the run of bytes, and the length of the run."""
    offsets, end = [], 0
    for size_bytes in sizes_bytes:
        start = -(-end // SEGMENT_ALIGN_BYTES) * SEGMENT_ALIGN_BYTES
        offsets.append(start)
        end = start + size_bytes
    return offsets, end


def encode_manifest(manifest: Manifest) -> bytes:
    """The body of a PUSH. Raises FrameError for a manifest that the peer would refuse."""
    body = BodyWriter()
    body.u8(_MANIFEST_VERSION)
    body.text(manifest.request_id)
    body.u32(manifest.epoch)
    body.worker(manifest.sender)
    body.worker(manifest.receiver)
    body.u16(manifest.part)
    body.u8(manifest.is_last)
    body.blob(manifest.payload, PAYLOAD_MAX_BYTES)
    body.u32(len(manifest.segments))
    for spec in manifest.segments:
        body.u8(_KIND_CODES[spec.kind])
        body.u16(spec.layer)
        body.u8(_DTYPE_CODES[spec.dtype])
        body.u8(len(spec.shape))
        for dim in spec.shape:
            body.u64(dim)
        body.u64(spec.size_bytes)
        body.u32(spec.start)
        body.u32(spec.crc32c)
    _check(manifest)
    return body.finish()


def decode_manifest(body: bytes) -> Manifest:
    """The manifest in ``body``. Raises FrameError for anything that is not exactly one."""
    reader = BodyReader(body)
    version = reader.u8()
    if version != _MANIFEST_VERSION:
        raise FrameError(f"manifest version {version}, not {_MANIFEST_VERSION}")
    request_id, epoch = reader.text(), reader.u32()
    sender, receiver = reader.worker(), reader.worker()
    part, is_last = reader.u16(), reader.u8()
    if is_last > 1:
        raise FrameError(f"{is_last} is neither true nor false")
    payload = reader.blob(PAYLOAD_MAX_BYTES)
    num_segments = reader.u32()
    if num_segments > MAX_SEGMENTS:
        raise FrameError(f"{num_segments} segments, at most {MAX_SEGMENTS} are allowed")
    specs = tuple(_read_spec(reader) for _ in range(num_segments))
    reader.finish()
    manifest = Manifest(request_id, epoch, sender, receiver, payload, specs, part, bool(is_last))
    _check(manifest)
    return manifest


def _read_spec(reader: BodyReader) -> SegmentSpec:
    kind_code, layer, dtype_code, num_dims = reader.u8(), reader.u16(), reader.u8(), reader.u8()
    if kind_code >= len(_KINDS) or dtype_code >= len(_DTYPE_NAMES):
        raise FrameError(f"unknown kind {kind_code} or dtype {dtype_code}")
    if num_dims > MAX_DIMS:
        raise FrameError(f"{num_dims} dimensions, at most {MAX_DIMS} are allowed")
    shape = tuple(reader.u64() for _ in range(num_dims))
    return SegmentSpec(
        kind=_KINDS[kind_code],
        layer=layer,
        dtype=_DTYPE_NAMES[dtype_code],
        shape=shape,
        size_bytes=reader.u64(),
        start=reader.u32(),
        crc32c=reader.u32(),
    )


def _check(manifest: Manifest) -> None:
    """The rules that both sides hold a manifest to."""
    if _REQUEST_ID.fullmatch(manifest.request_id) is None:
        raise FrameError("the request id is malformed")
    if len(manifest.segments) > MAX_SEGMENTS:
        raise FrameError(f"{len(manifest.segments)} segments, at most {MAX_SEGMENTS} are allowed")
    seen = set()
    for spec in manifest.segments:
        label = f"{spec.kind.value}, layer {spec.layer}"
        if spec.layer == _NO_LAYER or len(spec.shape) > MAX_DIMS:
            raise FrameError(f"{label}: layer or number of dimensions out of range")
        if spec.size_bytes != _size_bytes(spec.dtype, spec.shape):
            raise FrameError(f"{label}: {spec.size_bytes} bytes do not fit shape {spec.shape}")
        if (spec.kind, spec.layer) in seen:
            raise FrameError(f"{label}: named twice")
        seen.add((spec.kind, spec.layer))
    if not 0 < manifest.size_bytes <= MAX_TOTAL_BYTES:
        raise FrameError(f"{manifest.size_bytes} bytes in all")


def _check_flat(data: Bytes, label: str) -> None:
    # UCX sends a strided array as raw storage, without an error: wrong bytes.
    if data.dtype != np.uint8 or data.ndim != 1 or not data.flags.c_contiguous:
        raise InvariantViolation(f"{label}: not a flat run of bytes")


def _size_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    if dtype not in _DTYPES:
        raise FrameError(f"dtype {dtype!r} cannot be sent")
    return math.prod(shape) * _DTYPES[dtype]
