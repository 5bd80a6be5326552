"""With several threads the library splits a product's rows into blocks; no row may notice."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from stateferry_kernels.linear.torch_ops import linear
from stateferry_kernels.row_tile import bmm_rows
from support.ssm_case import Shape, Walker, make_layer, make_tokens


@pytest.fixture(params=[1, 2, 4])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


ROW_COUNTS = (*range(1, 36), 63, 64, 65, 100, 511, 512)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 290), (256, 1160), (512, 256), (96, 4097)])
def test_linear_rows(dtype: torch.dtype, inputs: int, outputs: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, inputs, generator=generator).to(dtype)
    weight = torch.randn(outputs, inputs, generator=generator).to(dtype)
    bias = torch.randn(outputs, generator=generator).to(dtype)
    expected = linear(x, weight, bias)
    changed = [n for n in ROW_COUNTS if not torch.equal(linear(x[:n], weight, bias), expected[:n])]
    assert changed == []


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("num_rows", [1, 5, 9, 12, 20, 64])
def test_product_rows_whatever_the_batch(num_rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(17, 64, 48, generator=generator)
    right = torch.randn(17, 48, 72, generator=generator)
    expected = bmm_rows(left, right)
    for n in (1, 2, 3, 17):
        assert torch.equal(bmm_rows(left[:n, :num_rows], right[:n]), expected[:n, :num_rows])


SHAPES = {
    "one group": Shape(nheads=8, headdim=64, dstate=64, ngroups=1, grid=64),
    "one head": Shape(nheads=1, headdim=20, dstate=12, ngroups=1, grid=12),
    "eight groups": Shape(nheads=8, headdim=24, dstate=20, ngroups=8, grid=48),
}


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("name", SHAPES)
def test_decode_rows_commits_and_prefill_agree_to_the_byte(name: str) -> None:
    layer = make_layer(SHAPES[name])
    grid = layer.shape.grid
    tokens = make_tokens(layer, 2 * grid + 5, with_z=True)
    whole, stepped = Walker(layer), Walker(layer)
    [expected] = whole.extend([tokens])
    rows = [stepped.decode([tokens[t : t + 1]]) for t in range(len(tokens))]
    assert torch.equal(torch.cat(rows), expected.xBC)
    for point, slot in whole.boundaries[0].items():
        other = stepped.boundaries[0][point]
        assert torch.equal(whole.state.ssm_state[slot], stepped.state.ssm_state[other])
