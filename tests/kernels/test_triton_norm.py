"""The Triton norms against their definitions in fp64: interpreted here, on the GPU where there is
one."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

pytest.importorskip("triton")

from stateferry_kernels.norm import reference, torch_ops, triton_ops  # noqa: E402
from support.ssm_case import relative_error  # noqa: E402

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
EPS = 1e-5
GATED = ["gated_rms_norm", "norm_then_gate"]
SIZES = [(5, 48, 16), (3, 21, 7), (2, 1100, 1100), (1, 8, 1), (4, 80, 10)]


def rows(num_rows: int, dim: int, dtype: torch.dtype, seed: int = 0) -> list[torch.Tensor]:
    """x and z, views of wider rows, and a weight."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randn(num_rows, 2 * dim + 3, generator=generator).to(dtype).to(DEVICE)
    weight = torch.randn(dim, generator=generator).to(dtype).to(DEVICE)
    return [wide[:, :dim], wide[:, dim + 3 :], weight]


def wide(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor.double() for tensor in tensors]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_plain(size: tuple[int, int, int], dtype: torch.dtype) -> None:
    x, _, weight = rows(*size[:2], dtype)
    y = triton_ops.rms_norm(x, weight, EPS)
    assert y.dtype == dtype and y.shape == x.shape
    expected = reference.rms_norm_reference(*wide([x, weight]), EPS)
    assert relative_error(y, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("name", GATED)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_gated(name: str, size: tuple[int, int, int], dtype: torch.dtype) -> None:
    num_rows, dim, group_size = size
    inputs = rows(num_rows, dim, dtype)
    y = getattr(triton_ops, name)(*inputs, EPS, group_size)
    assert y.dtype == dtype and y.shape == inputs[0].shape
    expected = getattr(reference, f"{name}_reference")(*wide(inputs), EPS, group_size)
    assert relative_error(y, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("weight_dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_dtypes_and_roundings_of_the_torch_operations(
    dtype: torch.dtype, weight_dtype: torch.dtype
) -> None:
    x, z, weight = rows(8, 512, dtype)
    weight = weight.to(weight_dtype)
    calls: list[tuple[str, list[Any]]] = [("rms_norm", [x, weight, EPS])]
    calls += [(name, [x, z, weight, EPS, 256]) for name in GATED]
    for name, arguments in calls:
        y = getattr(triton_ops, name)(*arguments)
        same = getattr(torch_ops, name)(*arguments)
        assert y.dtype == same.dtype
        if y.dtype is torch.bfloat16:
            # Where the fp32 values differ in the last bit, a rounding may go the other way.
            assert (y == same).float().mean() > 0.97
        assert relative_error(y, same) < (1e-6 if dtype == weight_dtype == torch.float32 else 1e-3)


@pytest.mark.parametrize("name", ["rms_norm", *GATED])
def test_a_row_does_not_know_its_neighbours(name: str) -> None:
    x, z, weight = rows(6, 48, torch.float32)
    gate = [] if name == "rms_norm" else [z]
    group = [] if name == "rms_norm" else [12]
    norm = getattr(triton_ops, name)
    y = norm(x, *gate, weight, EPS, *group)
    for part in (slice(0, 1), slice(3, 4), slice(2, 6)):
        alone = norm(x[part], *(t[part] for t in gate), weight, EPS, *group)
        assert torch.equal(alone, y[part])


def test_no_rows() -> None:
    x, z, weight = rows(0, 12, torch.bfloat16)
    for y in (
        triton_ops.rms_norm(x, weight, EPS),
        triton_ops.gated_rms_norm(x, z, weight, EPS, 4),
        triton_ops.norm_then_gate(x, z, weight, EPS, 4),
    ):
        assert y.shape == (0, 12) and y.dtype == torch.bfloat16


def test_refuses_sizes_that_do_not_fit() -> None:
    x, z, weight = rows(2, 12, torch.float32)
    with pytest.raises(ValueError, match="groups of 5"):
        triton_ops.gated_rms_norm(x, z, weight, EPS, 5)
    with pytest.raises(ValueError, match="weight"):
        triton_ops.rms_norm(x, weight[:-1], EPS)
    with pytest.raises(ValueError, match="z"):
        triton_ops.norm_then_gate(x, z[:1], weight, EPS, 4)
