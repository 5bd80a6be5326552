"""The GPU's projections: values and what they promise about bits. On the CPU where there is no
GPU."""

from __future__ import annotations

import pytest
import torch

from stateferry_kernels.linear.triton_ops import (
    ROW_BUCKET,
    linear,
    linear_in_tiles,
    rows_are_alike,
)
from support.ssm_case import relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def case(num_rows: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """x, weight and bias."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(num_rows, 136), (72, 136), (72,)]
    return [torch.randn(size, generator=generator).to(dtype).to(DEVICE) for size in sizes]


@pytest.mark.parametrize("product", [linear, linear_in_tiles])
@pytest.mark.parametrize("num_rows", [0, 1, 63, 64, 65, 150])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_values(product: object, num_rows: int, dtype: torch.dtype) -> None:
    x, weight, bias = case(num_rows, dtype)
    y = product(x, weight, bias)
    assert y.shape == (num_rows, 72) and y.dtype == dtype
    expected = x.double() @ weight.double().T
    if num_rows:
        assert relative_error(y, expected + bias.double()) < TOLERANCE[dtype]
        assert relative_error(product(x, weight, None), expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_row_does_not_know_how_many_there_are(dtype: torch.dtype) -> None:
    x, weight, bias = case(150, dtype)
    assert rows_are_alike(weight, bias)
    whole = linear_in_tiles(x, weight, bias)
    for first, last in ((0, 1), (3, 5), (100, 150), (20, 20 + ROW_BUCKET)):
        assert torch.equal(linear(x[first:last], weight, bias), whole[first:last])
    assert torch.equal(linear_in_tiles(x[7:140], weight, bias), whole[7:140])


def test_a_product_that_is_not_alike_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose first eight rows are summed the other way round."""
    _, weight, _ = case(0, torch.float32)

    def uneven(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return torch.cat([x[:8].flip(1) @ weight.flip(1).T, x[8:] @ weight.T])

    monkeypatch.setattr(torch.nn.functional, "linear", uneven)
    assert not rows_are_alike(weight)
