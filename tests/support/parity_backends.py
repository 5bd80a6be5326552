"""The kernels that the parity entries are tested on, and the device that their tensors live on."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"

from stateferry_kernels.dispatch import BackendUnavailable, select_kernels  # noqa: E402
from stateferry_kernels.operations import Kernels  # noqa: E402

# The interpreter is slow: it runs only the cases that are marked as small.
SMALL_CASES = ("torch", "cpu", "triton")
ALL_CASES = SMALL_CASES if ON_GPU else ("torch", "cpu")
# For what does not go through the kernels.
DEVICES = ("cpu", "cuda") if ON_GPU else ("cpu",)


def kernels_or_skip(name: str) -> Iterator[Kernels]:
    """The body of a fixture: the backend, with new tensors on its device. Skips the test with the
    reason when there is no such backend here."""
    try:
        kernels = select_kernels(name)
    except BackendUnavailable as error:
        pytest.skip(f"parity entries not tested on {name!r}: {error}")
    with torch.device("cuda" if name == "triton" and ON_GPU else "cpu"):
        yield kernels


class Numbers:
    """Random tensors on the default device, the same numbers on every one."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator("cpu").manual_seed(seed)

    def normal(self, *size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return self._placed(torch.randn(size, generator=self._generator, device="cpu"), dtype)

    def uniform(self, *size: int) -> torch.Tensor:
        numbers = torch.rand(size, generator=self._generator, device="cpu")
        return self._placed(numbers, torch.float32)

    def integers(self, low: int, high: int, count: int) -> list[int]:
        """``count`` numbers in [low, high)."""
        drawn = torch.randint(low, high, (count,), generator=self._generator, device="cpu")
        return drawn.tolist()

    def cuts(self, length: int, count: int) -> list[int]:
        """``count`` different numbers in [1, length), ascending."""
        drawn = torch.randperm(length - 1, generator=self._generator, device="cpu") + 1
        return sorted(drawn[:count].tolist())

    def _placed(self, numbers: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return numbers.to(dtype=dtype, device=torch.get_default_device())
