"""Activations, rotary and the residual norm in Triton, against the torch operations."""

from __future__ import annotations

import os

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

pytest.importorskip("triton")

from stateferry_kernels.dispatch import select_kernels  # noqa: E402
from support.ssm_case import relative_error  # noqa: E402

OURS, THEIRS = select_kernels("triton"), select_kernels("torch")
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-3}
each_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def drawn(*size: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(size, generator=generator)).to(dtype).to(DEVICE)


@each_dtype
@pytest.mark.parametrize("size", [(1, 1), (3, 1000), (2, 2600)], ids=str)
def test_activations(size: tuple[int, int], dtype: torch.dtype) -> None:
    both = drawn(size[0], 2 * size[1], dtype=dtype)
    gate, up = both.split(size[1], dim=1)
    for name, arguments in (("relu2", (gate,)), ("silu_mul", (gate, up))):
        y, wanted = getattr(OURS, name)(*arguments), getattr(THEIRS, name)(*arguments)
        assert y.dtype == dtype and y.is_contiguous()
        assert relative_error(y, wanted) < TOLERANCE[dtype], name
    assert OURS.relu2(gate[:0]).shape == (0, size[1])


def test_what_is_not_finite_stays_so() -> None:
    x = torch.tensor([[torch.nan, torch.inf, -torch.inf, -0.0]], device=DEVICE)
    y = OURS.relu2(x)
    assert y.isnan().tolist() == [[True, False, False, False]]
    assert y[0, 1:].tolist() == [torch.inf, 0.0, 0.0]


@each_dtype
@pytest.mark.parametrize(("head_dim", "half"), [(16, 8), (20, 5), (6, 3)])
def test_rotary(head_dim: int, half: int, dtype: torch.dtype) -> None:
    x = drawn(4, 5, head_dim, dtype=dtype)[:, 1:4]
    cos, sin = (drawn(50, half, dtype=torch.float32, seed=seed) for seed in (1, 2))
    table = {"cos": cos, "sin": sin}
    positions = torch.tensor([0, 49, 3, 3], device=DEVICE)
    y = OURS.rotary(x, **table, positions=positions)
    wanted = THEIRS.rotary(x, **table, positions=positions)
    assert y.dtype == dtype and relative_error(y, wanted) < TOLERANCE[dtype]
    assert torch.equal(y[..., 2 * half :], x[..., 2 * half :])


@each_dtype
@pytest.mark.parametrize("residual_dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("weight_dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("dim", [7, 1536])
def test_add_rms_norm(
    dim: int, weight_dtype: torch.dtype, residual_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    """The sum, and the bits of ``rms_norm`` of it."""
    x = drawn(3, dim + 2, dtype=dtype)[:, :dim]
    residual, weight = drawn(3, dim, dtype=residual_dtype), drawn(dim, dtype=weight_dtype)
    normed, summed = OURS.add_rms_norm(x, residual, weight, 1e-5)
    _, wanted = THEIRS.add_rms_norm(x, residual, weight, 1e-5)
    assert summed.dtype == residual_dtype and torch.equal(summed, wanted)
    assert normed.dtype == weight_dtype
    assert torch.equal(normed, OURS.rms_norm(summed, weight, 1e-5))


def test_a_residual_of_another_shape_is_refused() -> None:
    x = drawn(3, 8, dtype=torch.float32)
    with pytest.raises(ValueError, match="residual: shape"):
        OURS.add_rms_norm(x, x[:2], x[0], 1e-5)
    with pytest.raises(ValueError, match="weight: shape"):
        OURS.add_rms_norm(x, x, x[0, :7], 1e-5)
