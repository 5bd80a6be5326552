"""Attention against its definition: sizes, cuts, page edges, strides, poison."""

from __future__ import annotations

import pytest
import torch

from stateferry_kernels.attention.reference import attention_reference
from stateferry_kernels.kv_layer import KvPlan, KvSequence
from support.backends import each_activation, kernels_of
from support.kv_case import Reader, Rows, Sizes, joined, make_rows
from support.ssm_case import relative_error

each_backend = pytest.mark.parametrize("backend", ["torch", "cpu", "reference"])
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
SIZES = {
    "one head": Sizes(1, 1, 1),
    "odd": Sizes(3, 1, 7),
    "no groups": Sizes(4, 4, 16),
    "three by two": Sizes(6, 2, 20, page_tokens=5),
    "half blocks": Sizes(4, 1, 24, page_tokens=64),
    "llama": Sizes(12, 4, 64),
    "long heads": Sizes(7, 1, 136, page_tokens=128),
}


def definition(rows: Rows, scale: float) -> torch.Tensor:
    q, k, v = rows.q.double(), rows.k.double().transpose(0, 1), rows.v.double().transpose(0, 1)
    outputs = [
        attention_reference(q[t], k[:, : t + 1], v[:, : t + 1], scale) for t in range(len(q))
    ]
    return torch.stack(outputs)


@each_backend
@each_activation
@pytest.mark.parametrize("name", SIZES)
def test_sizes(backend: str, name: str, dtype: torch.dtype) -> None:
    sizes = SIZES[name]
    rows = make_rows(sizes, 149, dtype)
    expected = definition(rows, sizes.scale)
    for cuts in ((), (1, 2), (63, 64, 65), (16, 32, 80, 128), (100, 101, 147)):
        y = Reader(kernels_of(backend), sizes, 149, dtype).walk(rows, cuts)
        assert relative_error(y, expected) < TOLERANCE[dtype], cuts


@each_backend
@each_activation
def test_one_row_and_a_full_page(backend: str, dtype: torch.dtype) -> None:
    sizes = Sizes()
    for tokens in (1, 15, 16, 17, 31, 32, 33, 64, 65):
        rows = make_rows(sizes, tokens, dtype)
        y = Reader(kernels_of(backend), sizes, tokens, dtype).walk(rows, ())
        assert relative_error(y, definition(rows, sizes.scale)) < TOLERANCE[dtype]


@each_backend
@each_activation
def test_a_packed_batch(backend: str, dtype: torch.dtype) -> None:
    sizes, lengths = Sizes(), (70, 1, 33, 64)
    sequences = [make_rows(sizes, n, dtype, seed=i) for i, n in enumerate(lengths)]
    reader = Reader(kernels_of(backend), sizes, 70, dtype, count=len(lengths))
    first = reader.run({i: rows[: len(rows) // 2] for i, rows in enumerate(sequences)})
    second = reader.run({i: rows[len(rows) // 2 :] for i, rows in enumerate(sequences)})
    for rows, *parts in zip(sequences, first, second, strict=True):
        y = torch.cat(parts)
        assert relative_error(y, definition(rows, sizes.scale)) < TOLERANCE[dtype]


@each_backend
@each_activation
def test_what_is_written(backend: str, dtype: torch.dtype) -> None:
    sizes = Sizes()
    rows = make_rows(sizes, 53, dtype)
    reader = Reader(kernels_of(backend), sizes, 53, dtype)
    reader.walk(rows, (10, 11, 40))
    for pool, given in ((reader.layer.keys, rows.k), (reader.layer.values, rows.v)):
        held = torch.cat([pool[page] for page in reader.pages[0]], dim=1).transpose(0, 1)
        assert torch.equal(held[:53], given)
        assert held[53:].isnan().all()
        assert all(pool[page].isnan().all() for page in reader.spare)


@each_backend
def test_strided_rows(backend: str) -> None:
    """q, k and v as parts of one projection, as models have them; out inside something wider."""
    sizes, tokens = Sizes(), 40
    rows = make_rows(sizes, tokens, torch.float32)
    parts = [rows.q.flatten(1), rows.k.flatten(1), rows.v.flatten(1)]
    together = torch.cat([*parts, torch.full((tokens, 3), torch.nan)], dim=1)
    widths = [part.shape[1] for part in parts]
    q, k, v, _ = together.split([*widths, 3], dim=1)
    wide = torch.full((tokens, widths[0] + 5), torch.nan)
    reader = Reader(kernels_of(backend), sizes, tokens, torch.float32)
    kernels_of(backend).attention(
        q.view(tokens, sizes.num_heads, -1),
        k.view(tokens, sizes.kv_heads, -1),
        v.view(tokens, sizes.kv_heads, -1),
        plan=KvPlan(sizes.page_tokens, (KvSequence(0, tokens, reader.pages[0]),)),
        kv=reader.layer,
        scale=sizes.scale,
        out=wide[:, 2:-3].view(tokens, sizes.num_heads, -1),
    )
    y = wide[:, 2:-3].view(tokens, sizes.num_heads, -1)
    assert relative_error(y, definition(rows, sizes.scale)) < 1e-5
    assert wide[:, :2].isnan().all() and wide[:, -3:].isnan().all()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_later_token_of_infinite_values_touches_no_earlier_row(backend: str) -> None:
    sizes = Sizes()
    rows = make_rows(sizes, 30, torch.float32)
    rows.v[20:] = torch.inf
    y = Reader(kernels_of(backend), sizes, 30, torch.float32).walk(rows, ())
    assert relative_error(y[:20], definition(rows[:20], sizes.scale)) < 1e-5


@each_backend
def test_a_prefix_that_two_sequences_share(backend: str) -> None:
    sizes, shared = Sizes(), 32
    prefix = make_rows(sizes, shared, torch.float32)
    ends = [make_rows(sizes, 9, torch.float32, seed=5 + i) for i in range(2)]
    reader = Reader(kernels_of(backend), sizes, 64, torch.float32, count=2)
    reader.run({0: prefix})
    reader.pages[1] = reader.pages[0][:2] + reader.pages[1][2:]
    reader.positions[1] = shared
    for end, y in zip(ends, reader.run(dict(enumerate(ends))), strict=True):
        expected = definition(joined([prefix, end]), sizes.scale)[shared:]
        assert relative_error(y, expected) < 1e-5


@each_backend
def test_no_rows_are_no_work(backend: str) -> None:
    sizes = Sizes()
    empty = make_rows(sizes, 4, torch.float32)[:0]
    for sequences in ((), (KvSequence(0, 0, ()),), (KvSequence(7, 0, (1,)),)):
        layer = Reader(kernels_of(backend), sizes, 16, torch.float32).layer
        before = [pages.clone().view(torch.int32) for pages in (layer.keys, layer.values)]
        kernels_of(backend).attention(
            empty.q,
            empty.k,
            empty.v,
            plan=KvPlan(16, sequences),
            kv=layer,
            scale=1.0,
            out=empty.q.clone(),
        )
        for pages, bits in zip((layer.keys, layer.values), before, strict=True):
            assert torch.equal(pages.view(torch.int32), bits)
