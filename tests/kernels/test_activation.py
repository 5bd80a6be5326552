"""silu_mul, relu2 and add_rms_norm: values, rows that do not depend on others, bad input."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from stateferry_kernels.activation.reference import relu2_reference, silu_mul_reference
from stateferry_kernels.norm.reference import rms_norm_reference
from stateferry_kernels.operations import Kernels
from support.backends import ACTIVATIONS, each_activation, kernels_of, torch_threads
from support.ssm_case import relative_error

each_backend = pytest.mark.parametrize("backend", ["torch", "cpu", "reference"])
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 5e-3}
SIZES = (1, 7, 16, 100, 3072)


def pair(count: int, n: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Two strided parts of one projection."""
    generator = torch.Generator().manual_seed(n)
    both = (3 * torch.randn(count, 2 * n + 1, generator=generator)).to(dtype)
    return both[:, :n], both[:, n + 1 :]


@each_backend
@each_activation
@pytest.mark.parametrize("n", SIZES)
def test_values(backend: str, dtype: torch.dtype, n: int) -> None:
    kernels, (gate, up) = kernels_of(backend), pair(33, n, dtype)
    y = kernels.silu_mul(gate, up)
    assert y.dtype is dtype
    assert relative_error(y, silu_mul_reference(gate.double(), up.double())) < TOLERANCE[dtype]
    y = kernels.relu2(gate)
    assert y.dtype is dtype
    assert relative_error(y, relu2_reference(gate.double())) < TOLERANCE[dtype]


@each_backend
def test_what_is_not_a_number_stays_so(backend: str) -> None:
    kernels, x = kernels_of(backend), torch.tensor([[torch.nan, -1.0, 2.0, torch.inf]])
    assert kernels.relu2(x)[0, 0].isnan() and kernels.silu_mul(x, x)[0, 0].isnan()
    assert kernels.relu2(x)[0, 1:].tolist() == [0.0, 4.0, torch.inf]


@each_backend
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("names", [*itertools.product(ACTIVATIONS, repeat=3)], ids="-".join)
def test_add_norm_is_the_sum_and_its_norm(backend: str, n: int, names: tuple[str, ...]) -> None:
    """To the byte: models may use either form."""
    kernels = kernels_of(backend)
    x_dtype, residual_dtype, weight_dtype = (ACTIVATIONS[name] for name in names)
    x, residual = pair(17, n, torch.float32)
    x, residual = x.to(x_dtype), residual.to(residual_dtype)
    weight = torch.linspace(-1, 2, n).to(weight_dtype)
    normed, summed = kernels.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(summed, (x.float() + residual.float()).to(residual_dtype))
    assert torch.equal(normed, kernels.rms_norm(summed, weight, 1e-5))
    expected = rms_norm_reference(summed.double(), weight.double(), 1e-5)
    assert relative_error(normed, expected) < 2 * TOLERANCE[weight_dtype]


OPERATIONS: dict[str, Callable[[Kernels, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "silu_mul": lambda kernels, x, y: kernels.silu_mul(x, y),
    "relu2": lambda kernels, x, y: kernels.relu2(x),
    "normed": lambda kernels, x, y: kernels.add_rms_norm(x, y, y[0].clone() * 0 + 1, 1e-5)[0],
    "summed": lambda kernels, x, y: kernels.add_rms_norm(x, y, y[0].clone() * 0 + 1, 1e-5)[1],
}


@each_backend
@each_activation
@pytest.mark.parametrize("name", OPERATIONS)
def test_rows_and_threads(backend: str, dtype: torch.dtype, name: str) -> None:
    kernels, operation = kernels_of(backend), OPERATIONS[name]
    x, y = pair(301, 1000, dtype)
    expected = operation(kernels, x, y)
    assert torch.equal(operation(kernels, x.contiguous(), y.contiguous()), expected)
    for count in (1, 2, 5, 8, 9, 300):
        assert torch.equal(operation(kernels, x[-count:], y[-count:]), expected[-count:])
    for threads in (1, 2, 4):
        with torch_threads(threads):
            assert torch.equal(operation(kernels, x, y), expected)


@each_backend
def test_no_rows(backend: str) -> None:
    kernels, empty = kernels_of(backend), torch.zeros(0, 8)
    assert kernels.relu2(empty).shape == kernels.silu_mul(empty, empty).shape == (0, 8)
    normed, summed = kernels.add_rms_norm(empty, empty, torch.ones(8), 1e-5)
    assert normed.shape == summed.shape == (0, 8)


X = torch.ones(4, 6)
BAD: dict[str, tuple[type[Exception], str, Callable[[Kernels], Any]]] = {
    "gate dtype": (TypeError, "gate", lambda k: k.silu_mul(X.double(), X.double())),
    "gate dimensions": (ValueError, "gate", lambda k: k.silu_mul(X[0], X[0])),
    "gate strides": (ValueError, "gate", lambda k: k.silu_mul(X.T.contiguous().T, X)),
    "up dtype": (TypeError, "up", lambda k: k.silu_mul(X, X.bfloat16())),
    "up shape": (ValueError, "up", lambda k: k.silu_mul(X, X[:3])),
    "up strides": (ValueError, "up", lambda k: k.silu_mul(X, X.T.contiguous().T)),
    "relu2 dtype": (TypeError, "x", lambda k: k.relu2(X.double())),
    "relu2 dimensions": (ValueError, "x", lambda k: k.relu2(X[None])),
    "relu2 strides": (ValueError, "x", lambda k: k.relu2(X.T.contiguous().T)),
}
BAD_NORMS: dict[str, tuple[type[Exception], str, Callable[[Kernels], Any]]] = {
    "residual": (ValueError, "residual", lambda k: k.add_rms_norm(X, X[:3], X[0], 1e-5)),
    "residual dtype": (TypeError, "residual", lambda k: k.add_rms_norm(X, X.half(), X[0], 1e-5)),
    "weight": (ValueError, "weight", lambda k: k.add_rms_norm(X, X, X[0, :5], 1e-5)),
    "x dtype": (TypeError, "x", lambda k: k.add_rms_norm(X.double(), X, X[0], 1e-5)),
}


@each_backend
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(backend: str, name: str) -> None:
    error, what, call = BAD[name]
    kernels = kernels_of(backend)
    with pytest.raises(error, match=f"^{what}"):
        call(kernels)


@pytest.mark.parametrize("name", BAD_NORMS)
def test_bad_sums_are_named(name: str) -> None:
    error, what, call = BAD_NORMS[name]
    kernels = kernels_of("cpu")
    with pytest.raises(error, match=f"^{what}"):
        call(kernels)
