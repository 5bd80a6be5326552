"""The grid form in Triton against its definition in fp64, and chunk scan, decode rows, drafts and
commits against each other to the byte: interpreted here, on the GPU where there is one."""

from __future__ import annotations

import math
import os
from dataclasses import fields, replace
from typing import Any

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

pytest.importorskip("triton")

from stateferry_kernels.dispatch import select_kernels  # noqa: E402
from stateferry_kernels.draft_plans import ROOT  # noqa: E402
from stateferry_kernels.layer_state import PAD_SLOT, STATE_DTYPES, LayerState  # noqa: E402
from stateferry_kernels.plans import CommitPlan, DecodePlan  # noqa: E402
from stateferry_kernels.ssd.triton_tiles import GridFormTile, grid_form_tile, row_tile  # noqa: E402
from stateferry_kernels.state_update import triton_ops as update_triton  # noqa: E402
from support.ssm_case import (  # noqa: E402
    Layer,
    Shape,
    Tokens,
    Walker,
    all_pools,
    make_layer,
    make_tokens,
    relative_error,
    split_active,
)
from support.triton_walker import (  # noqa: E402
    device_walker,
    on_device,
    tokens_of,
)

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "bf16"])
SMALL = Shape(nheads=2, headdim=20, dstate=12, ngroups=1, grid=16)


def life(walker: Walker, layer: Layer, with_z: bool) -> list[torch.Tensor]:
    """Extends, decode rows, drafts and accepts of three sequences; outputs of each step."""
    grid, device = layer.shape.grid, walker.state.tail_x.device

    def tokens(length: int, seed: int) -> Tokens:
        part = make_tokens(layer, length, seed=seed, with_z=with_z)
        return Tokens(*(None if t is None else t.to(device) for t in (part.xBC, part.dt, part.z)))

    def extend(*lengths: int, every: bool = True) -> torch.Tensor:
        new = [tokens(n, seed) if n else None for seed, n in enumerate(lengths)]
        return torch.cat([part.xBC for part in walker.extend(new, every)])

    window = layer.shape.d_conv - 1
    outputs = [
        extend(1, 2 * grid + 3, max(1, window)),
        # Cut mid-interval; one crosses, one fills its interval; one boundary is not kept.
        extend(grid - 2, 2 * grid, 0, every=False),
        walker.decode([tokens(1, seed) for seed in (10, 11, 12)]),
        extend(0, 1, grid),
    ]
    chain, tree = (ROOT, 0, 1, 2), (ROOT, ROOT, 0, 1, 2, 3, 3, 5, 4)
    drafts = [tokens(n, seed) for seed, n in ((20, 9), (21, 4), (22, 9))]
    outputs += walker.verify(list(zip(drafts, (tree, chain, tree), strict=True)))
    walker.accept([(1, 3, 5, 7), (), (0, 2)])
    # So near the grid that branches pass it.
    for number in range(3):
        rest = grid - walker.positions[number] % grid
        pieces: list[Tokens | None] = [None] * 3
        pieces[number] = tokens(rest - 2 if rest > 2 else grid + rest - 2, 30 + number)
        outputs += [part.xBC for part in walker.extend(pieces)]
    drafts = [tokens(n, seed) for seed, n in ((40, 9), (41, 4), (42, 9))]
    outputs += walker.verify(list(zip(drafts, (tree, chain, tree), strict=True)))
    walker.accept([(1, 3, 5, 7), (0, 1), (0,)])
    outputs.append(walker.decode([tokens(1, seed) for seed in (50, 51, 52)]))
    return outputs


def assert_same_life(layer: Layer, with_z: bool = True) -> None:
    ours, theirs = device_walker(layer, 3), Walker(layer, 3, select_kernels("reference"))
    both = [life(walker, layer, with_z) for walker in (ours, theirs)]
    named, wanted = (
        {f"step {i}": output.cpu() for i, output in enumerate(outputs)}
        | {name: pool.cpu() for name, pool in all_pools(walker.state, walker.drafts).items()}
        for outputs, walker in zip(both, (ours, theirs), strict=True)
    )
    rounded = torch.bfloat16 in (layer.dtype, layer.state_dtype)
    for place, theirs_there in wanted.items():
        assert torch.equal(named[place].isnan(), theirs_there.isnan()), place
        error = relative_error(named[place].nan_to_num(), theirs_there.nan_to_num())
        assert error < TOLERANCE[torch.bfloat16 if rounded else torch.float32], place


@pytest.mark.parametrize("state_dtype", STATE_DTYPES, ids=["fp32 state", "bf16 state"])
@DTYPES
def test_a_life_of_three_sequences(dtype: torch.dtype, state_dtype: torch.dtype) -> None:
    assert_same_life(make_layer(SMALL, dtype=dtype, state_dtype=state_dtype, dt_limit=(0.01, 0.5)))


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        (Shape(nheads=2, headdim=5, dstate=3, ngroups=2, d_conv=2, grid=12), {"with_D": False}),
        (
            Shape(nheads=1, headdim=40, dstate=33, ngroups=1, d_conv=1, grid=16),
            {"with_dt_bias": False},
        ),
        (Shape(nheads=8, headdim=8, dstate=4, ngroups=8, grid=20), {"dt_limit": (0.05, 0.2)}),
    ],
    ids=["two groups, no D", "one group, no window, no bias", "eight groups, limits"],
)
def test_shapes_and_options(shape: Shape, options: dict[str, Any]) -> None:
    assert_same_life(make_layer(shape, **options), with_z=False)


@pytest.mark.parametrize("grid", [80, 130])
@DTYPES
def test_intervals_longer_than_a_block_of_tokens(grid: int, dtype: torch.dtype) -> None:
    shape = Shape(nheads=1, headdim=5, dstate=3, ngroups=1, grid=grid)
    layer = make_layer(shape, dtype=dtype)
    ours, theirs = device_walker(layer), Walker(layer, 1, select_kernels("reference"))
    for step, length in enumerate((grid - 1, 2)):
        part = make_tokens(layer, length, seed=step)
        [a], [b] = ours.extend([on_device(part)]), theirs.extend([part])
        assert relative_error(a.xBC.cpu(), b.xBC) < TOLERANCE[dtype]
    slot = ours.slots[0]
    stored = ours.state.ssm_state[slot].cpu()
    assert relative_error(stored, theirs.state.ssm_state[slot]) < TOLERANCE[dtype]


def whole(layer: Layer, tokens: Tokens) -> tuple[torch.Tensor, Walker]:
    walker = device_walker(layer)
    [output] = walker.extend([tokens])
    return output.xBC, walker


def assert_same_end(one: Walker, i: int, other: Walker, j: int) -> None:
    """Same position, tail, and state at every boundary that both have, to the byte."""
    assert one.positions[i] == other.positions[j]
    for a, b in zip(one.tail(i), other.tail(j), strict=True):
        assert torch.equal(a, b)
    shared = one.boundaries[i].keys() & other.boundaries[j].keys()
    assert one.positions[i] < one.layer.shape.grid or shared
    for point in shared:
        for pool in ("ssm_state", "conv_state"):
            a = getattr(one.state, pool)[one.boundaries[i][point]]
            b = getattr(other.state, pool)[other.boundaries[j][point]]
            assert torch.equal(a, b), f"{pool} at {point}"


BYTES = Shape(nheads=2, headdim=16, dstate=16, ngroups=1, grid=32)


@DTYPES
def test_cuts_and_decode_rows_give_the_bytes_of_one_extend(dtype: torch.dtype) -> None:
    layer = make_layer(BYTES, dtype=dtype)
    tokens = tokens_of(layer, 75)
    expected, uncut = whole(layer, tokens)
    cut, pieces = device_walker(layer), []
    for length in (1, 30, -3, 10, 20, -2, 6, -3):
        position = cut.positions[0]
        if length > 0:
            [output] = cut.extend([tokens[position : position + length]])
            pieces.append(output.xBC)
        for t in range(position, position - length):
            pieces.append(cut.decode([tokens[t : t + 1]]))
    assert cut.positions == [75]
    assert torch.equal(torch.cat(pieces), expected)
    assert_same_end(cut, 0, uncut, 0)


@DTYPES
def test_decode_rows_of_a_served_shape_give_the_bytes_of_the_extend(dtype: torch.dtype) -> None:
    """Where the tuned tiles of the two differ."""
    shape = Shape(nheads=2, headdim=64, dstate=128, ngroups=1, grid=64)
    layer = make_layer(shape, dtype=dtype)
    tokens = tokens_of(layer, 70)
    expected, uncut = whole(layer, tokens)
    cut = device_walker(layer)
    [first] = cut.extend([tokens[:58]])
    rows = [cut.decode([tokens[t : t + 1]]) for t in range(58, 70)]
    assert torch.equal(torch.cat([first.xBC, *rows]), expected)
    assert_same_end(cut, 0, uncut, 0)


@DTYPES
def test_packed_sequences_give_the_bytes_they_give_alone(dtype: torch.dtype) -> None:
    layer = make_layer(BYTES, dtype=dtype)
    sequences = [tokens_of(layer, n, seed=n) for n in (33, 1, 40)]
    packed = device_walker(layer, 3)
    outputs = packed.extend(sequences)
    for number, tokens in enumerate(sequences):
        expected, alone = whole(layer, tokens)
        assert torch.equal(outputs[number].xBC, expected)
        assert_same_end(packed, number, alone, 0)


@pytest.mark.parametrize("start", [3, 30])
@DTYPES
def test_drafts_give_the_bytes_of_an_extend_along_each_path(dtype: torch.dtype, start: int) -> None:
    layer = make_layer(BYTES, dtype=dtype)
    tokens, noise = tokens_of(layer, start + 5), tokens_of(layer, 7, seed=9)
    parents = (ROOT, 0, ROOT, 1, 3, 2, 3)
    walker = device_walker(layer)
    walker.extend([tokens[:start]])
    [drafted] = walker.verify([(noise, parents)])
    for path in ((0, 1, 3, 4), (0, 1, 3, 6), (2, 5)):
        nodes = torch.tensor(path, device=DEVICE)
        along = Tokens(noise.xBC[nodes], noise.dt[nodes], noise.z[nodes])
        joined = [torch.cat([getattr(tokens[:start], n), getattr(along, n)]) for n in PARTS]
        expected, other = whole(layer, Tokens(*joined))
        assert torch.equal(drafted[nodes], expected[start:])
    walker.accept([(2, 5)])
    assert_same_end(walker, 0, other, 0)


PARTS = ("xBC", "dt", "z")


def test_padding_rows_are_left_alone() -> None:
    layer = make_layer(SMALL)
    alone, padded = device_walker(layer), device_walker(layer)
    for walker in (alone, padded):
        walker.extend([tokens_of(layer, 20)])
    device_layer = alone.layer
    generator = torch.Generator().manual_seed(9)
    active = torch.randn(3, SMALL.conv_dim, generator=generator).to(DEVICE)
    dt = torch.tensor([math.nan, 0.3, math.nan], device=DEVICE)[:, None].expand(3, SMALL.nheads)
    out = torch.full((3, SMALL.nheads, SMALL.headdim), 7.0, device=DEVICE)

    def decode(rows: slice, state: LayerState, plan: DecodePlan) -> None:
        x, B, C = split_active(active[rows], SMALL)
        update_triton.decode_row(
            x, dt[rows], B, C, params=device_layer.ssm, plan=plan, state=state, out=out[rows]
        )

    slot = alone.slots[0]
    decode(slice(1, 2), alone.state, DecodePlan(SMALL.grid, (slot,), (0,), (4,)))
    expected = out[1].clone()
    out.fill_(7.0)
    plan = DecodePlan(SMALL.grid, (PAD_SLOT, slot, PAD_SLOT), (0, 0, 3), (0, 4, 1))
    decode(slice(0, 3), padded.state, plan)
    assert torch.equal(out[1], expected)
    assert bool((out[0] == 7.0).all() and (out[2] == 7.0).all())
    for a, b in zip(
        all_pools(alone.state, alone.drafts).values(),
        all_pools(padded.state, padded.drafts).values(),
        strict=True,
    ):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())
    none = DecodePlan(SMALL.grid, (PAD_SLOT,), (0,), (0,))
    decode(slice(0, 1), padded.state, none)
    assert bool((out[0] == 7.0).all())


@pytest.mark.parametrize("rows", [1, 2, 16])
def test_a_commit_of_a_part_and_of_pages_that_share_their_columns(rows: int) -> None:
    layer = make_layer(SMALL)
    walker = device_walker(layer)
    walker.extend([tokens_of(layer, 16 + 15)])
    walker.decode([tokens_of(layer, 1, seed=3)])
    source = walker.boundaries[0][16]
    state = replace(
        walker.state,
        tail_xBC=walker.state.tail_xBC[:1].expand(walker.state.tail_x.shape[0], -1, -1),
    )
    plan = CommitPlan(16, (source,), (30,), (0,), (rows,))
    update_triton.commit(params=walker.layer.ssm, plan=plan, state=state)
    wanted = Walker(layer, 1, select_kernels("reference"))
    wanted.state = LayerState(
        **{f.name: getattr(state, f.name).cpu() for f in fields(state) if f.init}
    )
    wanted.state.ssm_state[30] = math.nan
    wanted.kernels.commit(params=layer.ssm, plan=replace(plan, cache={}), state=wanted.state)
    ours = state.ssm_state[30].cpu()
    assert relative_error(ours, wanted.state.ssm_state[30]) < TOLERANCE[torch.float32]
    assert torch.equal(state.conv_state[30].cpu(), wanted.state.conv_state[30])


def test_tiles_that_cannot_be_right_are_refused() -> None:
    with pytest.raises(ValueError, match="miscompiles"):
        GridFormTile(64, 64, 16, num_warps=4, num_stages=2)
    with pytest.raises(ValueError, match="miscompiles"):
        GridFormTile(32, 64, 64, num_warps=8, num_stages=3)
    with pytest.raises(ValueError, match="powers of two"):
        GridFormTile(8, 64, 16, num_warps=4, num_stages=1)
    with pytest.raises(ValueError, match="powers of two"):
        GridFormTile(32, 48, 16, num_warps=4, num_stages=1)


@pytest.mark.parametrize("product_bytes", [2, 4])
@pytest.mark.parametrize("headdim", [5, 64, 128])
@pytest.mark.parametrize("dstate", [3, 128, 256, 300])
@pytest.mark.parametrize("grid", [8, 64, 256])
def test_every_launch_size_has_the_same_blocks_of_tokens(
    product_bytes: int, headdim: int, dstate: int, grid: int
) -> None:
    tiles = [
        grid_form_tile(product_bytes, headdim, dstate, grid, rows, work)
        for work in (1, 100, 1000, 10**4, 10**6)
        for rows in (1, 16, 17, grid)
    ]
    tiles += [row_tile(product_bytes, headdim, dstate, grid, rows) for rows in (1, 4, 16, 17, grid)]
    assert len({tile.block_tokens for tile in tiles}) == 1
    assert all(tile.block_headdim <= max(16, 2 * headdim) for tile in tiles)
