"""A token's bits do not depend on how its sequence was cut, on its neighbours, or on who asks.

These hold for the torch backend on this CPU because of the care that ssd/grid_form.py and
elementwise.py take, and for the C++ library because of native/src/tile.h; a change there, or
another torch, would show here.
"""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stateferry_kernels.layer_state import PAD_SLOT
from stateferry_kernels.operations import Kernels
from stateferry_kernels.plans import DecodePlan
from support.backends import each_activation, each_backend, each_dtype, kernels_of
from support.random_walk import HAZARDS, Choose, Walk
from support.ssm_case import Layer, Shape, Tokens, Walker, make_layer, make_tokens, split_active

GRIDS = (8, 16, 64)
SHAPE = Shape(grid=16)


def layer_of(grid: int, dtype: torch.dtype, state_dtype: torch.dtype) -> Layer:
    return make_layer(Shape(grid=grid), dtype=dtype, state_dtype=state_dtype, seed=3)


def whole(kernels: Kernels, layer: Layer, tokens: Tokens) -> tuple[torch.Tensor, Walker]:
    walker = Walker(layer, kernels=kernels)
    [output] = walker.extend([tokens])
    assert torch.isfinite(output.xBC).all()
    return output.xBC, walker


def assert_same_end(one: Walker, i: int, other: Walker, j: int) -> None:
    """Same position, tail, and state at every boundary that both have."""
    assert one.positions[i] == other.positions[j]
    for a, b in zip(one.tail(i), other.tail(j), strict=True):
        assert torch.equal(a, b)
    shared = one.boundaries[i].keys() & other.boundaries[j].keys()
    last = one.positions[i] // one.layer.shape.grid * one.layer.shape.grid
    assert last == 0 or last in shared
    for point in shared:
        for pool in ("ssm_state", "conv_state"):
            a = getattr(one.state, pool)[one.boundaries[i][point]]
            b = getattr(other.state, pool)[other.boundaries[j][point]]
            assert torch.equal(a, b), f"{pool} at {point}"


def assert_walk(
    kernels: Kernels, layer: Layer, lengths: list[int], choose: Choose, seed: int = 0
) -> Counter[str]:
    """Whatever the choices, each sequence ends as one extend of it alone does. Returns the hazards
    that the walk met."""
    sequences = [
        make_tokens(layer, n, seed=seed + 7 * k, with_z=True) for k, n in enumerate(lengths)
    ]
    walk = Walk(layer, kernels, sequences, choose)
    for number, (tokens, y) in enumerate(zip(sequences, walk.run(), strict=True)):
        expected, alone = whole(kernels, layer, tokens)
        assert torch.equal(y, expected)
        assert_same_end(walk.walker, number, alone, 0)
    return walk.met


def choices_of(data: st.DataObject) -> Choose:
    return lambda low, high: data.draw(st.integers(low, high))


@each_backend
@each_dtype
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_any_extends_rows_and_drafts(
    backend: str, dtype: torch.dtype, state_dtype: torch.dtype, data: st.DataObject
) -> None:
    grid = data.draw(st.sampled_from(GRIDS))
    layer = layer_of(grid, dtype, state_dtype)
    length = data.draw(st.integers(1, 75))
    assert_walk(kernels_of(backend), layer, [length], choices_of(data))


@each_backend
@each_dtype
@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_any_company(
    backend: str, dtype: torch.dtype, state_dtype: torch.dtype, data: st.DataObject
) -> None:
    layer = layer_of(data.draw(st.sampled_from(GRIDS)), dtype, state_dtype)
    lengths = data.draw(st.lists(st.integers(1, 50), min_size=2, max_size=4))
    assert_walk(kernels_of(backend), layer, lengths, choices_of(data))


# Heads that leave a part of a vector, states that end in a tile of each size, and a model's own.
SIZES = ((1, 1, 8), (5, 3, 8), (20, 8, 8), (33, 14, 16), (72, 32, 16), (80, 50, 24), (64, 128, 64))


@each_dtype
@pytest.mark.parametrize(("headdim", "dstate", "grid"), SIZES)
def test_walks_over_heads_of_any_size(
    headdim: int, dstate: int, grid: int, dtype: torch.dtype, state_dtype: torch.dtype
) -> None:
    shape = Shape(nheads=4, headdim=headdim, dstate=dstate, ngroups=2, grid=grid)
    layer = make_layer(shape, dtype=dtype, state_dtype=state_dtype, seed=5)
    # A scan of several chunks, of which decode rows and commits then make the same.
    tokens = make_tokens(layer, 2 * grid + 5, seed=1, with_z=True)
    expected, scanned = whole(kernels_of("cpu"), layer, tokens)
    rows = Walker(layer, kernels=kernels_of("cpu"))
    y = [rows.decode([tokens[t : t + 1]]) for t in range(len(tokens))]
    assert torch.equal(torch.cat(y), expected)
    assert len(rows.boundaries[0]) == len(scanned.boundaries[0]) == 2
    assert_same_end(rows, 0, scanned, 0)
    assert_walk(kernels_of("cpu"), layer, [2 * grid + 5, grid + 1], random.Random(2).randint)


@each_backend
@each_dtype
@pytest.mark.parametrize("grid", GRIDS)
def test_walks_that_meet_every_hazard(
    backend: str, grid: int, dtype: torch.dtype, state_dtype: torch.dtype
) -> None:
    layer = layer_of(grid, dtype, state_dtype)
    met: Counter[str] = Counter()
    for seed in range(6):
        lengths = [min(8 * grid, 150) + seed] * (1 + seed % 2)
        choose = random.Random(seed).randint
        met += assert_walk(kernels_of(backend), layer, lengths, choose, seed)
    # Drafts are shorter than the longest interval: there they pass the grid only sometimes.
    wanted = HAZARDS if grid < 64 else ("a draft passes the grid", "nothing is accepted")
    missed = [hazard for hazard in wanted if not met[hazard]]
    assert missed == []


@each_backend
@each_activation
@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=6))
def test_packing_with_any_neighbours(backend: str, dtype: torch.dtype, lengths: list[int]) -> None:
    kernels, layer = kernels_of(backend), layer_of(16, dtype, torch.float32)
    sequences = [make_tokens(layer, n, seed=7 * k) for k, n in enumerate(lengths)]
    packed = Walker(layer, len(lengths), kernels)
    outputs = packed.extend(sequences)
    for number, tokens in enumerate(sequences):
        expected, alone = whole(kernels, layer, tokens)
        assert torch.equal(outputs[number].xBC, expected)
        assert_same_end(packed, number, alone, 0)


@each_backend
@each_dtype
@pytest.mark.parametrize("count", [1, 2, 7, 9])
def test_decode_in_any_company(
    backend: str, dtype: torch.dtype, state_dtype: torch.dtype, count: int
) -> None:
    kernels, layer = kernels_of(backend), layer_of(16, dtype, state_dtype)
    sequences = [make_tokens(layer, 40 + k, seed=k) for k in range(count)]
    together = Walker(layer, count, kernels)
    together.extend([tokens[: 10 + k] for k, tokens in enumerate(sequences)])
    rows = [
        together.decode([tokens[10 + k + t :][:1] for k, tokens in enumerate(sequences)])
        for t in range(30)
    ]
    for k, tokens in enumerate(sequences):
        expected, alone = whole(kernels, layer, tokens)
        assert torch.equal(torch.stack([row[k] for row in rows]), expected[10 + k :])
        assert_same_end(together, k, alone, 0)


@each_backend
@each_dtype
@pytest.mark.parametrize("grid", [8, 16])
def test_a_snapshot_is_the_state_of_a_run_cut_there(
    backend: str, grid: int, dtype: torch.dtype, state_dtype: torch.dtype
) -> None:
    kernels, layer = kernels_of(backend), layer_of(grid, dtype, state_dtype)
    window = layer.shape.d_conv - 1
    tokens = make_tokens(layer, 4 * grid + 3)
    _, uncut = whole(kernels, layer, tokens)
    assert list(uncut.boundaries[0]) == [grid, 2 * grid, 3 * grid, 4 * grid]
    for point in uncut.boundaries[0]:
        # Started so near the boundary that the window reaches back before the extend, too.
        for start in (0, point - window - 1, *range(point - window, point)):
            cut = Walker(layer, kernels=kernels)
            if start:
                cut.extend([tokens[:start]])
            cut.extend([tokens[start:point]])
            assert cut.tail(0)[0].shape[0] == 0
            assert_same_end(uncut_until(uncut, point), 0, cut, 0)
        kept = uncut.state.conv_state[uncut.boundaries[0][point]]
        assert torch.equal(kept, tokens.xBC[point - window : point].T)


def uncut_until(walker: Walker, point: int) -> Walker:
    """The same walker as if it stood at a boundary that it has passed."""
    view = Walker.__new__(Walker)
    view.__dict__ |= walker.__dict__ | {"positions": [point]}
    return view


@each_backend
@each_dtype
def test_boundaries_that_nobody_keeps_change_nothing(
    backend: str, dtype: torch.dtype, state_dtype: torch.dtype
) -> None:
    kernels, layer = kernels_of(backend), layer_of(8, dtype, state_dtype)
    tokens = make_tokens(layer, 61)
    expected, keeper = whole(kernels, layer, tokens)
    walker = Walker(layer, kernels=kernels)
    [output] = walker.extend([tokens], every_boundary=False)
    assert list(walker.boundaries[0]) == [56]
    assert torch.equal(output.xBC, expected)
    assert_same_end(walker, 0, keeper, 0)


@each_backend
@each_activation
def test_pad_rows_are_skipped_and_change_nothing(backend: str, dtype: torch.dtype) -> None:
    kernels, layer = kernels_of(backend), layer_of(16, dtype, torch.float32)
    tokens = make_tokens(layer, 20)
    alone, padded = Walker(layer, kernels=kernels), Walker(layer, kernels=kernels)
    for walker in (alone, padded):
        walker.extend([tokens])
    active = torch.randn(3, SHAPE.conv_dim, generator=torch.Generator().manual_seed(9)).to(dtype)
    dt = torch.tensor([torch.nan, 0.3, torch.nan])[:, None].expand(3, SHAPE.nheads).to(dtype)
    out = torch.full((3, SHAPE.nheads, SHAPE.headdim), 7.0, dtype=dtype)
    columns = torch.full((3, SHAPE.conv_dim), 7.0, dtype=dtype)

    def decode(rows: slice, walker: Walker, plan: DecodePlan) -> None:
        x, B, C = split_active(active[rows], SHAPE)
        parts = {"plan": plan, "state": walker.state}
        kernels.causal_conv1d_row(active[rows], conv=layer.conv, out=columns[rows], **parts)
        kernels.decode_row(x, dt[rows], B, C, params=layer.ssm, out=out[rows], **parts)

    slot = alone.slots[0]
    decode(slice(1, 2), alone, DecodePlan(SHAPE.grid, (slot,), (0,), (4,)))
    expected, expected_columns = out[1].clone(), columns[1].clone()
    decode(
        slice(0, 3),
        padded,
        DecodePlan(SHAPE.grid, (PAD_SLOT, slot, PAD_SLOT), (0, 0, 5), (2, 4, 1)),
    )
    assert torch.equal(out[1], expected) and torch.isfinite(expected).all()
    assert torch.equal(columns[1], expected_columns)
    for untouched in (out[0], out[2], columns[0], columns[2]):
        assert (untouched == 7).all()
    for pool in ("tail_xBC", "tail_x", "tail_B", "tail_dt"):
        a, b = getattr(alone.state, pool), getattr(padded.state, pool)
        assert torch.equal(a.nan_to_num(99.0), b.nan_to_num(99.0)), pool
