# mypy: allow-untyped-calls
"""A small result of the device on its way to the host."""

from __future__ import annotations

import torch


class Arriving:
    """A copy of a tensor of the device, queued behind what computes it. It has memory of its own,
    so what is queued later may write to the tensor again."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._memory = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._memory.copy_(tensor, non_blocking=True)
        self._done = torch.cuda.Event()
        self._done.record()

    @property
    def is_here(self) -> bool:
        return bool(self._done.query())

    def wait(self) -> torch.Tensor:
        """The copy, on the host: once the device has come so far, and no later. On any thread."""
        self._done.synchronize()
        return self._memory
