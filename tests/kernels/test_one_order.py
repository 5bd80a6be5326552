"""A token's bits do not depend on how its sequence was cut, on its neighbours, or on who asks.

These hold for the torch backend on this CPU because of the care that ssd/grid_form.py and
elementwise.py take; a change there, or another torch, would show here.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stateferry_kernels.layer_state import PAD_SLOT
from stateferry_kernels.linear.torch_ops import linear
from stateferry_kernels.norm.torch_ops import gated_rms_norm, norm_then_gate, rms_norm
from stateferry_kernels.plans import DecodePlan
from stateferry_kernels.state_update.torch_ops import decode_row
from support.ssm_case import Layer, Shape, Tokens, Walker, make_layer, make_tokens, split_active

SHAPE = Shape(grid=16)
LAYERS = {
    dtype: make_layer(SHAPE, dtype=dtype, seed=3) for dtype in (torch.float32, torch.bfloat16)
}
DTYPES = pytest.mark.parametrize("dtype", LAYERS, ids=["fp32", "bf16"])


def whole(layer: Layer, tokens: Tokens) -> tuple[torch.Tensor, Walker]:
    walker = Walker(layer)
    [output] = walker.extend([tokens])
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


@DTYPES
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_cut_into_extends_and_decode_rows(dtype: torch.dtype, data: st.DataObject) -> None:
    layer = LAYERS[dtype]
    length = data.draw(st.integers(1, 75))
    tokens = make_tokens(layer, length, seed=length)
    expected, uncut = whole(layer, tokens)
    cut = Walker(layer)
    pieces = []
    while (position := cut.positions[0]) < length:
        if data.draw(st.booleans()):
            pieces.append(cut.decode([tokens[position : position + 1]]))
        else:
            step = data.draw(st.integers(1, length - position))
            [output] = cut.extend([tokens[position : position + step]], data.draw(st.booleans()))
            pieces.append(output.xBC)
    assert torch.equal(torch.cat(pieces), expected)
    assert_same_end(cut, 0, uncut, 0)


@DTYPES
@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=6))
def test_packing_with_any_neighbours(dtype: torch.dtype, lengths: list[int]) -> None:
    layer = LAYERS[dtype]
    sequences = [make_tokens(layer, n, seed=7 * k) for k, n in enumerate(lengths)]
    packed = Walker(layer, len(lengths))
    outputs = packed.extend(sequences)
    for number, tokens in enumerate(sequences):
        expected, alone = whole(layer, tokens)
        assert torch.equal(outputs[number].xBC, expected)
        assert_same_end(packed, number, alone, 0)


@DTYPES
@pytest.mark.parametrize("count", [1, 2, 7, 9])
def test_decode_in_any_company(dtype: torch.dtype, count: int) -> None:
    layer = LAYERS[dtype]
    sequences = [make_tokens(layer, 40 + k, seed=k) for k in range(count)]
    together = Walker(layer, count)
    together.extend([tokens[: 10 + k] for k, tokens in enumerate(sequences)])
    rows = [
        together.decode([tokens[10 + k + t :][:1] for k, tokens in enumerate(sequences)])
        for t in range(30)
    ]
    for k, tokens in enumerate(sequences):
        expected, alone = whole(layer, tokens)
        assert torch.equal(torch.stack([row[k] for row in rows]), expected[10 + k :])
        assert_same_end(together, k, alone, 0)


@DTYPES
def test_pad_rows_are_skipped_and_change_nothing(dtype: torch.dtype) -> None:
    layer = LAYERS[dtype]
    tokens = make_tokens(layer, 20)
    alone, padded = Walker(layer), Walker(layer)
    for walker in (alone, padded):
        walker.extend([tokens])
    active = torch.randn(3, SHAPE.conv_dim, generator=torch.Generator().manual_seed(9)).to(dtype)
    dt = torch.tensor([torch.nan, 0.3, torch.nan])[:, None].expand(3, SHAPE.nheads).to(dtype)
    out = torch.full((3, SHAPE.nheads, SHAPE.headdim), 7.0, dtype=dtype)

    def decode(rows: slice, walker: Walker, plan: DecodePlan) -> None:
        x, B, C = split_active(active[rows], SHAPE)
        parts = {"params": layer.ssm, "plan": plan, "state": walker.state}
        decode_row(x, dt[rows], B, C, out=out[rows], **parts)

    slot = alone.slots[0]
    decode(slice(1, 2), alone, DecodePlan(SHAPE.grid, (slot,), (0,), (4,)))
    expected = out[1].clone()
    decode(
        slice(0, 3),
        padded,
        DecodePlan(SHAPE.grid, (PAD_SLOT, slot, PAD_SLOT), (0, 0, 5), (2, 4, 1)),
    )
    assert torch.equal(out[1], expected) and torch.isfinite(expected).all()
    assert (out[0] == 7).all() and (out[2] == 7).all()
    for pool in ("tail_x", "tail_B", "tail_dt"):
        a, b = getattr(alone.state, pool), getattr(padded.state, pool)
        assert torch.equal(a.nan_to_num(99.0), b.nan_to_num(99.0)), pool


ROW_COUNTS = (1, 2, 3, 5, 8, 9, 16, 17, 64, 100, 300)


@DTYPES
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 300), (256, 1160), (512, 256), (96, 200)])
def test_linear_rows_do_not_depend_on_their_number(
    dtype: torch.dtype, inputs: int, outputs: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, inputs, generator=generator).to(dtype)
    weight = torch.randn(outputs, inputs, generator=generator).to(dtype)
    expected = linear(x, weight, None)
    for count in ROW_COUNTS:
        assert torch.equal(linear(x[-count:], weight, None), expected[-count:])


@DTYPES
def test_norm_rows_do_not_depend_on_their_number(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 120, generator=generator).to(dtype)
    z = torch.randn(300, 120, generator=generator).to(dtype)
    weight = torch.randn(120, generator=generator).to(dtype)
    for norm in (
        lambda x, z: rms_norm(x, weight, 1e-5),
        lambda x, z: gated_rms_norm(x, z, weight, 1e-5, 40),
        lambda x, z: norm_then_gate(x, z, weight, 1e-5, 40),
    ):
        expected = norm(x, z)
        for count in ROW_COUNTS:
            assert torch.equal(norm(x[-count:], z[-count:]), expected[-count:])
