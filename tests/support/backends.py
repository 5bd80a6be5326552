"""The backends that kernel tests run on, and the cases every one of them must pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from stateferry_kernels.dispatch import BackendUnavailable, select_kernels
from stateferry_kernels.native.library import Native, NativeUnavailable, native
from stateferry_kernels.operations import Kernels

BACKENDS = ("torch", "cpu")
ACTIVATIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Activations and states.
DTYPES = {
    f"{name}-{state}-state": (dtype, state_dtype)
    for name, dtype in ACTIVATIONS.items()
    for state, state_dtype in ACTIVATIONS.items()
}

each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_activation = pytest.mark.parametrize("dtype", ACTIVATIONS.values(), ids=ACTIVATIONS)
each_dtype = pytest.mark.parametrize(("dtype", "state_dtype"), DTYPES.values(), ids=DTYPES)


def kernels_of(backend: str) -> Kernels:
    """The backend's operations; skips the test with the reason when it cannot run here."""
    try:
        return select_kernels(backend)
    except BackendUnavailable as error:
        pytest.skip(f"nothing is tested on the {backend!r} backend: {error}")


def native_or_skip() -> Native:
    """The C++ library; skips the test with the reason when it cannot be loaded."""
    try:
        return native()
    except NativeUnavailable as error:
        pytest.skip(f"the C++ library is not tested: {error}")


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Operations may use this many threads meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
