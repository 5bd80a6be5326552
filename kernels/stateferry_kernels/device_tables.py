"""Tables of integers, brought from the host to a kernel without waiting for the device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch


def device_table(
    rows: Sequence[Sequence[int]], num_columns: int, device: torch.device
) -> torch.Tensor:
    """(len(rows), num_columns) int64 on the device, contiguous."""
    table = torch.tensor(rows, dtype=torch.int64, device="cpu").view(len(rows), num_columns)
    return _to_device(table, device)


def device_array(numbers: npt.NDArray[np.int64], device: torch.device) -> torch.Tensor:
    """The same numbers on the device, contiguous. On the host they are shared, not copied."""
    return _to_device(torch.from_numpy(numbers), device)


def _to_device(table: torch.Tensor, device: torch.device) -> torch.Tensor:
    if device.type != "cuda":
        return table.to(device)
    # Pinned, because a copy from other memory waits until the device has caught up.
    return table.pin_memory().to(device, non_blocking=True)
