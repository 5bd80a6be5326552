"""A row of attention has the same bits whatever the cuts, the company, the pages, the threads."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support.backends import each_activation, each_backend, kernels_of, torch_threads
from support.kv_case import Reader, Rows, Sizes, make_rows

SIZES = (Sizes(6, 2, 20), Sizes(3, 1, 64), Sizes(5, 5, 16), Sizes(8, 1, 33), Sizes(12, 4, 64))


def whole(backend: str, sizes: Sizes, rows: Rows) -> torch.Tensor:
    y = Reader(kernels_of(backend), sizes, len(rows), rows.q.dtype).walk(rows, ())
    assert torch.isfinite(y).all()
    return y


@each_backend
@each_activation
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_any_cut(backend: str, dtype: torch.dtype, data: st.DataObject) -> None:
    sizes = data.draw(st.sampled_from(SIZES))
    rows = make_rows(sizes, data.draw(st.integers(1, 300)), dtype)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(rows)), max_size=12)))
    reader = Reader(kernels_of(backend), sizes, len(rows), dtype, seed=1)
    assert torch.equal(reader.walk(rows, cuts), whole(backend, sizes, rows))


@each_backend
@each_activation
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_every_decode_row(backend: str, dtype: torch.dtype, sizes: Sizes) -> None:
    rows = make_rows(sizes, 140, dtype)
    reader = Reader(kernels_of(backend), sizes, len(rows), dtype)
    assert torch.equal(reader.walk(rows, range(1, len(rows))), whole(backend, sizes, rows))


@each_backend
@each_activation
def test_company(backend: str, dtype: torch.dtype) -> None:
    sizes, choose = Sizes(12, 4, 64), random.Random(0)
    sequences = [make_rows(sizes, 30 + 41 * i, dtype, seed=i) for i in range(4)]
    reader = Reader(kernels_of(backend), sizes, 200, dtype, count=4)
    outputs: list[list[torch.Tensor]] = [[] for _ in sequences]
    while any(reader.positions[i] < len(rows) for i, rows in enumerate(sequences)):
        parts = {}
        for i, rows in enumerate(sequences):
            first = reader.positions[i]
            count = min(choose.choice((0, 1, 1, 1, 5, 30, 90)), len(rows) - first)
            if count:
                parts[i] = rows[first : first + count]
        for i, y in zip(parts, reader.run(parts) if parts else (), strict=True):
            outputs[i].append(y)
    for rows, parts_of in zip(sequences, outputs, strict=True):
        assert torch.equal(torch.cat(parts_of), whole(backend, sizes, rows))


@each_backend
@each_activation
def test_pages_change_nothing(backend: str, dtype: torch.dtype) -> None:
    base = Sizes(6, 2, 24)
    rows = make_rows(base, 150, dtype)
    expected = whole(backend, base, rows)
    for page_tokens in (1, 5, 16, 64, 256):
        sizes = Sizes(6, 2, 24, page_tokens)
        for seed, cuts in enumerate(((), (149,), (7, 8, 9, 100))):
            reader = Reader(kernels_of(backend), sizes, len(rows), dtype, seed=seed)
            assert torch.equal(reader.walk(rows, cuts), expected)


@each_backend
@each_activation
def test_threads_change_nothing(backend: str, dtype: torch.dtype) -> None:
    sizes = Sizes(12, 4, 64)
    rows = make_rows(sizes, 400, dtype)

    def run(threads: int) -> torch.Tensor:
        with torch_threads(threads):
            reader = Reader(kernels_of(backend), sizes, len(rows), dtype)
            return reader.walk(rows, (250, 380, 381, 382))

    expected = run(1)
    assert torch.equal(expected, whole(backend, sizes, rows))
    for threads in (2, 4):
        assert torch.equal(run(threads), expected)


@each_backend
def test_equal_keys_and_underflowing_weights(backend: str) -> None:
    """Zeros, ties and weights that vanish: what a sign of zero or a skipped block would show."""
    sizes = Sizes(6, 2, 20)
    rows = make_rows(sizes, 200, torch.float32)
    rows.k[::3] = 0
    rows.v[::5] = -0.0
    rows.q[100:] *= 100
    reader = Reader(kernels_of(backend), sizes, len(rows), torch.float32)
    y = reader.walk(rows, range(1, 200))
    expected = whole(backend, sizes, rows)
    assert torch.equal(y.view(torch.int32), expected.view(torch.int32))
