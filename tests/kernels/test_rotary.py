"""Rotary position embedding: the definition, rows that do not depend on others, bad input."""

from __future__ import annotations

import pytest
import torch

from stateferry_kernels.rotary.reference import rotary_reference
from support.backends import each_activation, kernels_of, torch_threads
from support.ssm_case import relative_error

each_backend = pytest.mark.parametrize("backend", ["torch", "cpu", "reference"])
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 5e-3}
MAX_POSITIONS = 500


def tables(half: int) -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.outer(torch.arange(MAX_POSITIONS), 10.0 ** -torch.linspace(0, 4, half))
    return torch.cos(angles), torch.sin(angles)


def rows(count: int, heads: int, dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(count, heads, dim, generator=generator).to(dtype)
    return x, torch.randint(0, MAX_POSITIONS, (count,), generator=generator)


@each_backend
@each_activation
@pytest.mark.parametrize(
    ("heads", "dim", "half"), [(1, 2, 1), (12, 64, 32), (3, 80, 20), (2, 7, 3)]
)
def test_values(backend: str, dtype: torch.dtype, heads: int, dim: int, half: int) -> None:
    x, positions = rows(37, heads, dim, dtype)
    cos, sin = tables(half)
    y = kernels_of(backend).rotary(x, cos=cos, sin=sin, positions=positions)
    expected = rotary_reference(x.double(), cos.double(), sin.double(), positions)
    assert y.dtype is dtype
    assert relative_error(y, expected) < TOLERANCE[dtype]
    assert torch.equal(y[..., 2 * half :], x[..., 2 * half :])


@each_backend
def test_position_zero_turns_nothing_and_a_pair_keeps_its_length(backend: str) -> None:
    x, positions = rows(30, 2, 16, torch.float32)
    cos, sin = tables(8)
    rotary = kernels_of(backend).rotary
    assert torch.equal(rotary(x, cos=cos, sin=sin, positions=torch.zeros(30).long()), x)
    y = rotary(x, cos=cos, sin=sin, positions=positions)
    assert not torch.equal(y, x)
    lengths = [torch.hypot(r[..., :8], r[..., 8:]) for r in (x, y)]
    torch.testing.assert_close(*lengths)


@each_backend
@each_activation
def test_rows_strides_and_threads(backend: str, dtype: torch.dtype) -> None:
    x, positions = rows(400, 6, 64, dtype)
    cos, sin = tables(24)
    rotary = kernels_of(backend).rotary
    expected = rotary(x, cos=cos, sin=sin, positions=positions)
    wide = torch.full((400, 6 * 64 + 5), torch.nan, dtype=dtype)
    inside = wide[:, 3 : 3 + 6 * 64].view(400, 6, 64)
    inside.copy_(x)
    assert torch.equal(rotary(inside, cos=cos, sin=sin, positions=positions), expected)
    for count in (0, 1, 2, 13, 399):
        y = rotary(
            x[-count:] if count else x[:0], cos=cos, sin=sin, positions=positions[400 - count :]
        )
        assert torch.equal(y, expected[400 - count :])
    for threads in (1, 2, 4):
        with torch_threads(threads):
            assert torch.equal(rotary(x, cos=cos, sin=sin, positions=positions), expected)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("position", [-501, MAX_POSITIONS])
def test_a_position_that_is_not_in_the_tables(backend: str, position: int) -> None:
    x, positions = rows(5, 1, 8, torch.float32)
    positions[3] = position
    cos, sin = tables(4)
    with pytest.raises(IndexError):
        kernels_of(backend).rotary(x, cos=cos, sin=sin, positions=positions)


BAD = {
    "x dtype": (TypeError, "x", {"x": torch.zeros(4, 2, 8).double()}),
    "x shape": (ValueError, "x", {"x": torch.zeros(4, 8)}),
    "cos dtype": (TypeError, "cos", {"cos": torch.zeros(9, 4).bfloat16()}),
    "cos pairs": (ValueError, "cos", {"cos": torch.zeros(9, 5), "sin": torch.zeros(9, 5)}),
    "sin shape": (ValueError, "sin", {"sin": torch.zeros(8, 4)}),
    "sin dtype": (TypeError, "sin", {"sin": torch.zeros(9, 4).double()}),
    "positions dtype": (TypeError, "positions", {"positions": torch.zeros(4).int()}),
    "positions shape": (ValueError, "positions", {"positions": torch.zeros(5).long()}),
}


@each_backend
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(backend: str, name: str) -> None:
    error, what, bad = BAD[name]
    good = {"x": torch.zeros(4, 2, 8), "cos": torch.zeros(9, 4), "sin": torch.zeros(9, 4)}
    good["positions"] = torch.zeros(4).long()
    with pytest.raises(error, match=f"^{what}"):
        kernels_of(backend).rotary(**good | bad)
