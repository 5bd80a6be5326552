"""Where a labelled part of one sequence's state lies in the pools."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class StateView:
    """In place in a pool: ``pieces`` are contiguous and, back to back, a tensor of ``shape``.

    ``kind`` is the name that the part has in a hand-off; ``start`` where it begins along its first
    dimension, when the whole is handed off in several parts.
    """

    kind: str
    layer: int
    shape: tuple[int, ...]
    pieces: tuple[torch.Tensor, ...]
    start: int = 0

    @property
    def dtype(self) -> torch.dtype:
        return self.pieces[0].dtype

    @property
    def size_bytes(self) -> int:
        return sum(piece.nbytes for piece in self.pieces)


def whole(kind: str, layer: int, tensor: torch.Tensor) -> StateView:
    """A part that lies in one piece."""
    return StateView(kind, layer, tuple(tensor.shape), (tensor,))
