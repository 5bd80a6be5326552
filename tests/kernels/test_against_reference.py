"""Convolution, chunk scan, decode row and commit against the plain recurrence in fp64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from stateferry_kernels.conv1d.reference import causal_conv1d_reference
from stateferry_kernels.ssd.reference import ssd_reference
from support.backends import each_backend, kernels_of
from support.ssm_case import (
    Layer,
    Shape,
    Tokens,
    Walker,
    make_layer,
    make_tokens,
    relative_error,
    split_active,
)

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def reference(
    layer: Layer, tokens: Tokens, states_at: tuple[int, ...] = ()
) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    """y (seqlen, d_inner) and states, in fp64, of one sequence from its start."""
    ssm = layer.ssm

    def wide(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor.double()

    bias = wide(layer.conv.bias)
    active = causal_conv1d_reference(tokens.xBC.double(), layer.conv.weight.double(), bias)
    if layer.dtype is not torch.float32:
        # What the next operation really reads; otherwise two roundings would be compared.
        active = active.to(layer.dtype).double()
    x, B, C = split_active(active, layer.shape)
    y, _, states = ssd_reference(
        x,
        tokens.dt.double(),
        ssm.A.double(),
        B,
        C,
        D=wide(ssm.D),
        z=wide(tokens.z),
        dt_bias=wide(ssm.dt_bias),
        dt_softplus=ssm.dt_softplus,
        dt_limit=ssm.dt_limit,
        states_at=states_at,
    )
    return y.flatten(1), states


SHAPES = {
    "plain": Shape(),
    "one group": Shape(ngroups=1),
    "eight groups, odd sizes": Shape(nheads=8, headdim=24, dstate=20, ngroups=8, grid=48),
    "grid 64": Shape(nheads=3, headdim=40, dstate=33, ngroups=1, grid=64),
    "grid 256": Shape(nheads=2, headdim=8, dstate=8, ngroups=2, grid=256),
    "short window": Shape(d_conv=2, grid=16),
    "no window": Shape(d_conv=1, grid=8),
    "window as long as the grid": Shape(d_conv=4, grid=3),
    "window of five": Shape(d_conv=5, grid=8),
    "one channel": Shape(nheads=2, headdim=1, dstate=1, ngroups=1, grid=8),
    "one head": Shape(nheads=1, headdim=72, dstate=17, ngroups=1, grid=16),
    "large state": Shape(nheads=3, headdim=64, dstate=256, ngroups=3, grid=16),
    "usual state": Shape(nheads=5, headdim=20, dstate=128, ngroups=1, grid=16),
}


@each_backend
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "bf16"])
@pytest.mark.parametrize("with_z", [False, True], ids=["", "z"])
def test_prefill_of_every_awkward_length(
    backend: str, name: str, dtype: torch.dtype, with_z: bool
) -> None:
    shape = SHAPES[name]
    layer = make_layer(shape, dtype=dtype)
    grid = shape.grid
    lengths = sorted({1, max(1, shape.d_conv - 1), grid - 1, grid, grid + 1, 3 * grid + 3})
    sequences = [make_tokens(layer, length, seed=length, with_z=with_z) for length in lengths]
    walker = Walker(layer, len(sequences), kernels_of(backend))
    outputs = walker.extend(sequences)
    for number, (tokens, output) in enumerate(zip(sequences, outputs, strict=True)):
        points = tuple(range(grid, len(tokens) + 1, grid))
        y, states = reference(layer, tokens, points)
        assert relative_error(output.xBC, y) < TOLERANCE[dtype]
        assert set(walker.boundaries[number]) == set(points)
        for point in points:
            slot = walker.boundaries[number][point]
            assert relative_error(walker.state.ssm_state[slot], states[point]) < TOLERANCE[dtype]
            window = tokens.xBC[point - shape.d_conv + 1 : point].T
            assert torch.equal(walker.state.conv_state[slot], window)


OPTIONS = list(itertools.product([False, True], [False, True], [False, True]))


@each_backend
@pytest.mark.parametrize(("with_D", "with_dt_bias", "with_conv_bias"), OPTIONS)
@pytest.mark.parametrize("dt_limit", [(0.0, math.inf), (0.05, 0.2)], ids=["free", "clamped"])
def test_options(
    backend: str,
    with_D: bool,
    with_dt_bias: bool,
    with_conv_bias: bool,
    dt_limit: tuple[float, float],
) -> None:
    layer = make_layer(
        Shape(),
        with_D=with_D,
        with_dt_bias=with_dt_bias,
        with_conv_bias=with_conv_bias,
        dt_limit=dt_limit,
    )
    tokens = make_tokens(layer, 70)
    walker = Walker(layer, kernels=kernels_of(backend))
    [prefilled] = walker.extend([tokens[:40]])
    rows = [walker.decode([tokens[t : t + 1]]) for t in range(40, 70)]
    y, _ = reference(layer, tokens)
    assert relative_error(torch.cat([prefilled.xBC, *rows]), y) < 1e-5


@each_backend
@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "bf16"])
def test_decode_over_three_grid_intervals(backend: str, dtype: torch.dtype) -> None:
    layer = make_layer(Shape(grid=16), dtype=dtype)
    tokens = make_tokens(layer, 60, with_z=True)
    walker = Walker(layer, kernels=kernels_of(backend))
    rows = torch.cat([walker.decode([tokens[t : t + 1]]) for t in range(60)])
    y, states = reference(layer, tokens, (16, 32, 48))
    assert relative_error(rows, y) < TOLERANCE[dtype]
    for point, state in states.items():
        slot = walker.boundaries[0][point]
        assert relative_error(walker.state.ssm_state[slot], state) < TOLERANCE[dtype]
