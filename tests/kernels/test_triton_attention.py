"""Attention over pages in Triton, against the torch operations: interpreted here, on the GPU where
there is one."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

pytest.importorskip("triton")

from stateferry_kernels.attention import torch_ops, triton_ops  # noqa: E402
from stateferry_kernels.dispatch import select_kernels  # noqa: E402
from stateferry_kernels.kv_layer import KvPlan, KvSequence  # noqa: E402
from support.kv_case import Reader, Rows, Sizes, make_rows, poisoned_layer  # noqa: E402
from support.ssm_case import relative_error  # noqa: E402

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
each_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
SIZES = {
    "groups of 3": Sizes(),
    "one kv head": Sizes(num_heads=5, kv_heads=1, head_dim=24, page_tokens=20),
    "heads alone": Sizes(num_heads=2, kv_heads=2, head_dim=64, page_tokens=64),
    "a wide head": Sizes(num_heads=2, kv_heads=1, head_dim=160, page_tokens=16),
}
each_size = pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)


def on_device(rows: Rows) -> Rows:
    """Views into rows that hold more, as a projection's output does."""
    heads = [rows.q.shape[1], rows.k.shape[1], rows.v.shape[1]]
    qkv = torch.cat([rows.q, rows.k, rows.v], dim=1).to(DEVICE)
    return Rows(*qkv.split(heads, dim=1))


def reader(sizes: Sizes, most: int, dtype: torch.dtype, count: int = 1) -> Reader:
    with torch.device(DEVICE):
        return Reader(select_kernels("triton"), sizes, most, dtype, count)


@each_dtype
@each_size
def test_values(sizes: Sizes, dtype: torch.dtype) -> None:
    """Three sequences in one call, begun and gone on with, single rows among them."""
    ours = reader(sizes, 150, dtype, 3)
    theirs = Reader(select_kernels("torch"), sizes, 150, dtype, 3)
    rows = [make_rows(sizes, 150, dtype, seed) for seed in range(3)]
    moved = [on_device(part) for part in rows]
    for steps in (((0, 0, 70), (1, 0, 1)), ((0, 70, 71), (1, 1, 2)), ((0, 71, 150), (2, 0, 130))):
        got = ours.run({i: moved[i][a:b] for i, a, b in steps})
        wanted = theirs.run({i: rows[i][a:b] for i, a, b in steps})
        for y, expected in zip(got, wanted, strict=True):
            assert relative_error(y.cpu(), expected) < TOLERANCE[dtype]
    for mine, other in (
        (ours.layer.keys, theirs.layer.keys),
        (ours.layer.values, theirs.layer.values),
    ):
        assert torch.equal(mine.cpu().nan_to_num(7.0), other.nan_to_num(7.0))


@each_dtype
@each_size
def test_a_row_does_not_know_how_its_sequence_was_cut(sizes: Sizes, dtype: torch.dtype) -> None:
    """To the byte on a GPU: single rows are those of a prefill. The interpreter's products are
    numpy's, whose order depends on where in a tile a row lies."""
    length = 140 if DEVICE == "cuda" else 20
    rows = on_device(make_rows(sizes, length, dtype))
    whole = reader(sizes, length, dtype).walk(rows, [])
    company = reader(sizes, length, dtype, 2)
    other = on_device(make_rows(sizes, length, dtype, seed=5))
    for y in (
        reader(sizes, length, dtype).walk(rows, range(1, length)),
        reader(sizes, length, dtype).walk(rows, [7]),
        company.run({1: other, 0: rows})[1],
    ):
        if DEVICE == "cuda":
            assert torch.equal(y, whole)
        assert relative_error(y, whole) < TOLERANCE[dtype]


class Counted:
    """A kernel, and how often it was launched."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.launches = kernel, 0

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self.launches += 1
        return self.kernel[grid]


@each_dtype
def test_segments_walked_by_one_program_or_by_one_each(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """The same bytes, of sequences that end in their first segment, at the end of one, and later;
    and right."""
    monkeypatch.setattr(triton_ops, "_SEGMENT", 64)
    join = Counted(triton_ops.join_kernel)
    monkeypatch.setattr(triton_ops, "join_kernel", join)
    sizes = SIZES["groups of 3"]
    rows = [make_rows(sizes, 210, dtype, seed) for seed in range(3)]
    lengths, outputs = (200, 127, 20), []
    for busy in (1000, 0):
        monkeypatch.setattr(triton_ops, "_BUSY", busy)
        ours = reader(sizes, 210, dtype, 3)
        ours.run({i: on_device(rows[i][:n]) for i, n in enumerate(lengths)})
        join.launches = 0
        got = []
        for step in (1, 4):
            parts = {i: on_device(rows[i][a : a + step]) for i, a in enumerate(ours.positions)}
            got += ours.run(parts)
        outputs.append(got)
        assert join.launches == (2 if busy else 0)
    theirs = Reader(select_kernels("torch"), sizes, 210, dtype, 3)
    theirs.run({i: rows[i][:n] for i, n in enumerate(lengths)})
    wanted = [
        y
        for step in (1, 4)
        for y in theirs.run({i: rows[i][a : a + step] for i, a in enumerate(theirs.positions)})
    ]
    for one, other, expected in zip(*outputs, wanted, strict=True):
        assert torch.equal(one, other)
        assert relative_error(one.cpu(), expected) < TOLERANCE[dtype]


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="long sequences need a CUDA device")
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_rows_of_a_long_sequence_have_one_order(head_dim: int) -> None:
    """Single rows, drafts and any cut of a prefill, over several segments."""
    sizes = Sizes(num_heads=8, kv_heads=2, head_dim=head_dim, page_tokens=64)
    length = 1700
    rows = on_device(make_rows(sizes, length, torch.bfloat16))
    whole = reader(sizes, length, torch.bfloat16).walk(rows, [])
    for cuts in ([511, 512, 513, 1100], [1023, 1024, 1028, 1031], [*range(1530, 1545)]):
        assert torch.equal(reader(sizes, length, torch.bfloat16).walk(rows, cuts), whole)


def test_rows_that_are_padding_are_left_alone() -> None:
    """Tables that name no sequence: nothing is read or written."""
    sizes = SIZES["heads alone"]
    with torch.device(DEVICE):
        layer = poisoned_layer(sizes, 2, torch.bfloat16)
    layer.keys[0], layer.values[0] = 0, 0
    rows = on_device(make_rows(sizes, 2, torch.bfloat16))
    plan = KvPlan(64, (KvSequence(3, 1, (0,)), KvSequence(3, 1, (1,))))
    device = layer.keys.device
    tokens, _ = triton_ops.kv_tables(plan, device)
    tokens[1, 0] = -1
    triton_ops.kv_tiles(plan, 1, device)[1, 2] = -1
    out = torch.full_like(rows.q, torch.nan)
    triton_ops.attention(*rows_of(rows), plan=plan, kv=layer, scale=1.0, out=out)
    assert layer.keys[1].isnan().all() and out[1].isnan().all()
    assert torch.equal(layer.keys[0, :, 3], rows.k[0]) and not out[0].isnan().any()


def rows_of(rows: Rows) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return rows.q, rows.k, rows.v


def test_an_output_with_gaps_is_refused() -> None:
    sizes = SIZES["heads alone"]
    with torch.device(DEVICE):
        layer = poisoned_layer(sizes, 1, torch.float32)
    rows = on_device(make_rows(sizes, 2, torch.float32))
    out = torch.empty(2, 4, 64, device=DEVICE)[:, ::2]
    plan = KvPlan(64, (KvSequence(0, 2, (0,)),))
    with pytest.raises(ValueError, match="out: a row of heads"):
        triton_ops.attention(*rows_of(rows), plan=plan, kv=layer, scale=1.0, out=out)
    # The torch operations take it.
    torch_ops.attention(*rows_of(rows), plan=plan, kv=layer, scale=1.0, out=out)
