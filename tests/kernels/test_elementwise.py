"""Activations: right, and the same bits wherever an element stands in its tensor."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from stateferry_kernels.elementwise import silu, softplus

X = torch.randn(5000, generator=torch.Generator().manual_seed(0)) * 6
Activation = Callable[[torch.Tensor], torch.Tensor]


@pytest.mark.parametrize("activation", [silu, softplus])
def test_bits_do_not_depend_on_place_or_length(activation: Activation) -> None:
    whole = activation(X)
    for start in range(0, 200, 7):
        for length in (1, 3, 5, 8, 13, 16, 17, 33, 64, 100):
            rows = slice(start, start + length)
            assert torch.equal(activation(X[rows]), whole[rows])
    strided = torch.stack([X, X], dim=1)[:, 0]
    assert torch.equal(activation(strided), whole)


@pytest.mark.parametrize(("activation", "theirs"), [(silu, F.silu), (softplus, F.softplus)])
def test_values(activation: Activation, theirs: Activation) -> None:
    extremes = torch.tensor([-1e4, -100.0, -88.0, -20.0, 0.0, 19.9, 20.1, 100.0, 1e4])
    x = torch.cat([X, extremes])
    torch.testing.assert_close(activation(x), theirs(x.double()).float(), rtol=1e-6, atol=1e-7)
