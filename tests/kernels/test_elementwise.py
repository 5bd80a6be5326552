"""Activations: right, and the same bits wherever an element stands in its tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F

from stateferry_kernels import elementwise
from support.backends import native_or_skip

X = torch.randn(5000, generator=torch.Generator().manual_seed(0)) * 6
Activation = Callable[[torch.Tensor], torch.Tensor]
KINDS = {"exp": 0, "silu": 1, "softplus": 2}
SMALLEST_NORMAL = 2.0**-126


def native_function(name: str) -> Activation:
    library = native_or_skip()

    def call(x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous()
        out = torch.full_like(x, math.nan)
        library.elementwise(x.data_ptr(), x.numel(), KINDS[name], out.data_ptr())
        return out

    return call


def activation(backend: str, name: str) -> Activation:
    if backend == "cpu":
        return native_function(name)
    return {"silu": elementwise.silu, "softplus": elementwise.softplus}[name]


CASES = [("torch", "silu"), ("torch", "softplus"), *[("cpu", name) for name in KINDS]]


@pytest.mark.parametrize(("backend", "name"), CASES)
def test_bits_do_not_depend_on_place_or_length(backend: str, name: str) -> None:
    function = activation(backend, name)
    whole = function(X)
    for start in range(0, 200, 7):
        for length in (1, 3, 5, 8, 13, 16, 17, 33, 64, 100):
            rows = slice(start, start + length)
            assert torch.equal(function(X[rows]), whole[rows])
    strided = torch.stack([X, X], dim=1)[:, 0]
    assert torch.equal(function(strided), whole)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize(("name", "theirs"), [("silu", F.silu), ("softplus", F.softplus)])
def test_values(backend: str, name: str, theirs: Activation) -> None:
    extremes = torch.tensor([-1e4, -100.0, -88.0, -20.0, 0.0, 19.9, 20.1, 100.0, 1e4])
    x = torch.cat([X, extremes])
    ours = activation(backend, name)(x)
    torch.testing.assert_close(ours, theirs(x.double()).float(), rtol=1e-6, atol=1e-7)


def test_exp_over_its_whole_range() -> None:
    exp = native_function("exp")
    x = torch.cat([torch.linspace(-87.33, 88.376, 400_001), X / 1e3, X / 1e6])
    wanted = torch.exp(x.double())
    assert float(((exp(x).double() - wanted) / wanted).abs().max()) < 2e-7
    # Beyond: zero where the result is no normal number; infinity a little before it must be.
    assert (exp(torch.linspace(-1e5, -87.34, 1000)) == 0).all()
    assert (exp(torch.linspace(88.73, 1e5, 1000)) == math.inf).all()


@pytest.mark.parametrize("name", ["silu", "softplus"])
def test_relative_error_over_the_whole_range(name: str) -> None:
    # Where neither the value nor the exponential in it leaves the normal numbers.
    x = torch.cat([torch.linspace(-80.0, 80.0, 200_001), X / 1e3, X / 1e6])
    wide = x.double()
    wanted = wide * torch.sigmoid(wide) if name == "silu" else torch.log1p(torch.exp(wide))
    ours = native_function(name)(x).double()
    assert float(((ours - wanted).abs() / wanted.abs().clamp(min=1e-300)).max()) < 5e-7


def test_special_values() -> None:
    denormal = SMALLEST_NORMAL / 8
    x = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, denormal, -denormal])
    exp, softplus = native_function("exp")(x), native_function("softplus")(x)
    assert exp[0].isnan() and exp[1] == math.inf and exp[2] == 0
    assert (exp[3:] == 1).all()
    assert softplus[0].isnan() and softplus[1] == math.inf and softplus[2] == 0
    assert ((softplus[3:].double() - math.log(2)).abs() < 1e-7).all()
    silu = native_function("silu")(x)
    assert silu[0].isnan() and silu[1] == math.inf and (silu[3:] == 0).all()
    assert math.copysign(1, float(silu[4])) == -1


@pytest.fixture(params=[False, True], ids=["denormals kept", "denormals flushed"])
def flushing(request: pytest.FixtureRequest) -> Iterator[bool]:
    if not torch.set_flush_denormal(request.param):
        pytest.skip("this processor cannot flush denormal numbers")
    yield request.param
    torch.set_flush_denormal(False)


def test_the_callers_treatment_of_denormals_stays(flushing: bool) -> None:
    exp = native_function("exp")
    small = torch.full((64,), SMALLEST_NORMAL)
    assert bool((small * 0.5 == 0).all()) == flushing
    results = exp(X)
    assert bool((small * 0.5 == 0).all()) == flushing
    torch.set_flush_denormal(not flushing)
    assert torch.equal(exp(X), results)
