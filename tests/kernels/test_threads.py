"""With several threads the library splits a product's rows into blocks; no row may notice."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from stateferry_kernels.row_tile import bmm_rows
from support.backends import each_activation, each_backend, each_dtype, kernels_of, torch_threads
from support.ssm_case import Shape, Walker, make_layer, make_tokens, relative_error


@pytest.fixture(params=[1, 2, 4])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    with torch_threads(request.param):
        yield request.param


ROW_COUNTS = (*range(1, 71), 511, 512)


def linear_inputs(
    inputs: int, outputs: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(513, inputs, generator=generator).to(dtype)
    weight = torch.randn(outputs, inputs, generator=generator).to(dtype)
    return x, weight, torch.randn(outputs, generator=generator).to(dtype)


@pytest.mark.usefixtures("threads")
@each_backend
@each_activation
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 290), (256, 1160), (512, 256), (96, 2049)])
def test_linear_rows(backend: str, dtype: torch.dtype, inputs: int, outputs: int) -> None:
    linear = kernels_of(backend).linear
    x, weight, bias = linear_inputs(inputs, outputs, dtype)
    expected = linear(x, weight, bias)
    counts = ROW_COUNTS[::3] if outputs > 1000 else ROW_COUNTS
    changed = [n for n in counts if not torch.equal(linear(x[:n], weight, bias), expected[:n])]
    assert changed == []


@each_backend
@each_activation
@pytest.mark.parametrize("inputs", [1, 7, 33, 96, 768])
@pytest.mark.parametrize("outputs", [1, 3, 17, 300])
@pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])
def test_linear_of_odd_sizes(
    backend: str,
    dtype: torch.dtype,
    inputs: int,
    outputs: int,
    with_bias: bool,
) -> None:
    if backend == "torch" and dtype is torch.float32 and outputs <= 3:
        pytest.skip("torch sums products of so few outputs in an order that depends on the rows")
    linear = kernels_of(backend).linear
    x, weight, bias = linear_inputs(inputs, outputs, dtype)
    bias_or_none = bias if with_bias else None
    y = linear(x, weight, bias_or_none)
    wanted = x.double() @ weight.double().T + (bias.double() if with_bias else 0)
    assert relative_error(y, wanted) < (1e-5 if dtype is torch.float32 else 1e-2)
    for n in (1, 2, 5, 6, 7, 13, 70, 511, 512):
        assert torch.equal(linear(x[-n:], weight, bias_or_none), y[-n:]), n
    wide = torch.full((513, inputs + 3), torch.nan, dtype=dtype)
    wide[:, 1 : 1 + inputs] = x
    assert torch.equal(linear(wide[:, 1 : 1 + inputs], weight, bias_or_none), y)
    assert linear(x[:0], weight, bias_or_none).shape == (0, outputs)


@pytest.mark.usefixtures("threads")
@each_backend
@each_activation
@pytest.mark.parametrize(("dim", "group"), [(1, 1), (120, 40), (75, 25), (768, 768)])
def test_norm_rows(backend: str, dtype: torch.dtype, dim: int, group: int) -> None:
    kernels = kernels_of(backend)
    generator = torch.Generator().manual_seed(0)
    x, z = (torch.randn(513, dim, generator=generator).to(dtype) for _ in range(2))
    weight = torch.randn(dim, generator=generator).to(dtype)
    for norm in (
        lambda x, z: kernels.rms_norm(x, weight, 1e-5),
        lambda x, z: kernels.gated_rms_norm(x, z, weight, 1e-5, group),
        lambda x, z: kernels.norm_then_gate(x, z, weight, 1e-5, group),
    ):
        expected = norm(x, z)
        assert torch.isfinite(expected).all()
        for count in (1, 2, 3, 5, 8, 9, 16, 17, 64, 100, 300, 511, 512):
            assert torch.equal(norm(x[-count:], z[-count:]), expected[-count:])


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
    "five heads": Shape(nheads=5, headdim=72, dstate=128, ngroups=1, grid=16),
}


@pytest.mark.usefixtures("threads")
@each_backend
@pytest.mark.parametrize("name", SHAPES)
def test_decode_rows_commits_and_prefill_agree_to_the_byte(backend: str, name: str) -> None:
    layer, kernels = make_layer(SHAPES[name]), kernels_of(backend)
    grid = layer.shape.grid
    tokens = make_tokens(layer, 2 * grid + 5, with_z=True)
    whole, stepped = Walker(layer, kernels=kernels), Walker(layer, kernels=kernels)
    [expected] = whole.extend([tokens])
    rows = [stepped.decode([tokens[t : t + 1]]) for t in range(len(tokens))]
    assert torch.equal(torch.cat(rows), expected.xBC)
    for point, slot in whole.boundaries[0].items():
        other = stepped.boundaries[0][point]
        assert torch.equal(whole.state.ssm_state[slot], stepped.state.ssm_state[other])


@each_backend
@each_dtype
@pytest.mark.parametrize("name", ["five heads", "eight groups"])
def test_the_number_of_threads_changes_nothing(
    backend: str, name: str, dtype: torch.dtype, state_dtype: torch.dtype
) -> None:
    layer = make_layer(SHAPES[name], dtype=dtype, state_dtype=state_dtype)
    sequences = [make_tokens(layer, 40 + 13 * k, seed=k) for k in range(3)]

    def run(threads: int) -> list[torch.Tensor]:
        with torch_threads(threads):
            walker = Walker(layer, 3, kernels_of(backend))
            outputs = [part.xBC for part in walker.extend([t[:-3] for t in sequences])]
            outputs += [walker.decode([t[n - 3 :][:1] for t in sequences]) for n in (0, 1)]
        states = [walker.state.ssm_state[slot] for b in walker.boundaries for slot in b.values()]
        return outputs + states + [part for n in range(3) for part in walker.tail(n)]

    expected = run(1)
    for threads in (2, 4):
        assert all(torch.equal(a, b) for a, b in zip(run(threads), expected, strict=True))
