"""Between a sequence's place in the pools and the segments of a hand-off."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from stateferry.cache.state_view import StateView
from stateferry.core.errors import FrameError
from stateferry.transfer.manifest import (
    OutgoingSegment,
    Segment,
    dtype_name,
    segment_from_pieces,
    segment_from_tensor,
)


def outgoing_segments(views: Sequence[StateView]) -> list[OutgoingSegment]:
    """Segments that share the pools' memory; of pools on a GPU, a copy."""
    segments: list[OutgoingSegment] = []
    for view in views:
        pieces = [piece.cpu() for piece in view.pieces]
        if len(pieces) == 1:
            whole = pieces[0].view(view.shape)
            segments.append(segment_from_tensor(view.kind, view.layer, whole, view.start))
        else:
            segments.append(
                segment_from_pieces(view.kind, view.layer, view.shape, pieces, view.start)
            )
    return segments


def take_in_segments(segments: Sequence[Segment], views: Sequence[StateView]) -> None:
    """Copy what arrived to where it belongs. Raises FrameError, before a byte is copied, unless the
    segments are exactly those of ``views``. Mutates the pools."""
    expected = [(v.kind, v.layer, v.start, dtype_name(v.dtype), v.shape) for v in views]
    arrived = [(s.kind.value, s.layer, s.start, s.dtype, s.shape) for s in segments]
    for number, (ours, theirs) in enumerate(zip(expected, arrived, strict=False)):
        if ours != theirs:
            raise FrameError(f"segment {number} is {theirs}, this state's is {ours}")
    if len(expected) != len(arrived):
        raise FrameError(f"{len(arrived)} segments, this state has {len(expected)}")
    for segment, view in zip(segments, views, strict=True):
        values = torch.from_numpy(segment.data).view(view.dtype)
        start = 0
        for piece in view.pieces:
            end = start + math.prod(piece.shape)
            piece.copy_(values[start:end].view(piece.shape))
            start = end
