"""causal_conv1d_fn and causal_conv1d_update as causal_conv1d and SGLang call them, against the
definition in fp64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from stateferry_kernels.operations import Kernels
from stateferry_kernels.parity import causal_conv1d_fn, causal_conv1d_update
from support.parity_backends import ALL_CASES, DEVICES, SMALL_CASES, Numbers, kernels_or_skip
from support.parity_reference import assert_close, conv

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
PAD = -1


@pytest.fixture(params=ALL_CASES)
def kernels(request: pytest.FixtureRequest) -> Iterator[Kernels]:
    yield from kernels_or_skip(request.param)


@pytest.fixture(params=SMALL_CASES)
def any_kernels(request: pytest.FixtureRequest) -> Iterator[Kernels]:
    yield from kernels_or_skip(request.param)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[None]:
    with torch.device(request.param):
        yield


def normal(*size: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return Numbers(seed).normal(*size, dtype=dtype)


def make_conv(dim: int, width: int, has_bias: bool = True) -> tuple[Any, Any]:
    """weight and bias, fp32 as in causal_conv1d's tests."""
    return normal(dim, width, seed=1), normal(dim, seed=2) if has_bias else None


def history(x: torch.Tensor, width: int) -> torch.Tensor:
    """x (dim, seqlen) after zeros, for ``conv``."""
    return F.pad(x, (width - 1, 0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("seqlen", [1, 2, 8, 64, 129, 151, 372])
def test_batch(
    kernels: Kernels,
    seqlen: int,
    width: int,
    has_bias: bool,
    activation: str | None,
    dtype: torch.dtype,
) -> None:
    """x is a slice of a wider row, channels first; a dimension that no tile divides."""
    dim = 72
    x = normal(2, dim + 40, seqlen, dtype=dtype)[:, 8 : 8 + dim]
    weight, bias = make_conv(dim, width, has_bias)
    before = x.clone()
    out = causal_conv1d_fn(x, weight, bias, activation=activation, kernels=kernels)
    expected = [conv(history(row, width), weight, bias, activation) for row in x]
    assert out.dtype == dtype and torch.equal(x, before)
    assert_close(out, torch.stack(expected), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", [None, "silu"])
def test_many_channels(kernels: Kernels, activation: str | None, dtype: torch.dtype) -> None:
    x, (weight, bias) = normal(2, 4096 + 32, 130, dtype=dtype), make_conv(4096 + 32, 4)
    out = causal_conv1d_fn(x, weight, bias, activation=activation, kernels=kernels)
    expected = [conv(history(row, 4), weight, bias, activation) for row in x]
    assert_close(out, torch.stack(expected), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", [None, "swish"])
@pytest.mark.parametrize("has_initial", [False, True])
@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("seqlen", [1, 2, 3, 65, 128])
def test_initial_and_final_states(
    kernels: Kernels,
    seqlen: int,
    width: int,
    has_initial: bool,
    activation: str | None,
    dtype: torch.dtype,
) -> None:
    """Channels last, as causal_conv1d wants it for states."""
    dim = 40
    x = normal(2, seqlen, dim, dtype=dtype).mT
    weight, bias = make_conv(dim, width)
    initial = normal(2, width - 1, dim, dtype=dtype, seed=3).mT if has_initial else None
    columns = torch.cat([x.new_zeros(2, dim, width - 1) if initial is None else initial, x], dim=2)
    final_out = torch.full((2, dim, width - 1), math.nan, dtype=dtype)
    for given in (None, final_out):
        out, final = causal_conv1d_fn(
            x,
            weight,
            bias,
            initial_states=initial,
            return_final_states=True,
            final_states_out=given,
            activation=activation,
            kernels=kernels,
        )
        expected = [conv(row, weight, bias, activation) for row in columns]
        assert_close(out, torch.stack(expected), dtype)
        assert torch.equal(final, columns[:, :, seqlen:])
        assert given is None or final is given


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("seqlen", [8, 65, 257])
def test_seq_idx_with_padding(
    kernels: Kernels, seqlen: int, width: int, activation: str | None, dtype: torch.dtype
) -> None:
    """Some sequences in each row, then padding of -1 whose outputs are zero."""
    dim, batch = 24, 3
    x = normal(batch, dim, seqlen, dtype=dtype)
    weight, bias = make_conv(dim, width)
    numbers = Numbers(seqlen)
    seq_idx = torch.full((batch, seqlen), -1, dtype=torch.int32)
    expected = torch.zeros(batch, dim, seqlen, dtype=torch.float64)
    for row in range(batch):
        cuts = numbers.cuts(seqlen, 2 + row)
        for number, (begin, end) in enumerate(pairwise([0, *cuts])):
            seq_idx[row, begin:end] = 10 * row + number
            columns = history(x[row, :, begin:end], width)
            expected[row, :, begin:end] = conv(columns, weight, bias, activation)
    out = causal_conv1d_fn(x, weight, bias, seq_idx=seq_idx, activation=activation, kernels=kernels)
    assert_close(out, expected, dtype)
    assert (out.mT[seq_idx < 0] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("lengths_on_host", [False, True])
def test_packed_as_sglang_calls_it(
    kernels: Kernels, lengths_on_host: bool, width: int, activation: str | None, dtype: torch.dtype
) -> None:
    check_packed(kernels, lengths_on_host, width, activation, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [2, 4])
def test_small_packed(any_kernels: Kernels, width: int, dtype: torch.dtype) -> None:
    check_packed(any_kernels, False, width, "silu", dtype)


def check_packed(
    kernels: Kernels, lengths_on_host: bool, width: int, activation: str | None, dtype: torch.dtype
) -> None:
    """Windows in slots, some of them old, some of sequences shorter than the window, an empty
    sequence, whose slot stays as it is, and a padding one. Windows that are not read are NaN."""
    dim, lengths = 40, [5, 1, 64, 0, 2, 130, 1]
    slots = torch.tensor([3, 8, 0, 5, PAD, 6, 1], dtype=torch.int32)
    has_initial = torch.tensor([True, True, False, False, True, True, False])
    x = normal(sum(lengths), dim, dtype=dtype).mT
    weight, bias = make_conv(dim, width)
    conv_states = normal(9, dim, width - 1, dtype=dtype, seed=4)
    conv_states[[0, 1, 2, 4, 5, 7]] = math.nan
    expected_states = conv_states.clone()
    cuts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    expected = torch.zeros(dim, sum(lengths), dtype=torch.float64)
    for number, (begin, end) in enumerate(pairwise(cuts)):
        slot = int(slots[number])
        if slot == PAD:
            x[:, begin:end] = math.nan
        if slot == PAD or begin == end:
            continue
        old = conv_states[slot] if has_initial[number] else x.new_zeros(dim, width - 1)
        columns = torch.cat([old, x[:, begin:end]], dim=1)
        expected[:, begin:end] = conv(columns, weight, bias, activation)
        expected_states[slot] = columns[:, end - begin :]
    lengths_by = {"seq_lens_cpu": lengths} if lengths_on_host else {}
    out = causal_conv1d_fn(
        x,
        weight,
        bias,
        query_start_loc=torch.tensor(cuts, dtype=torch.int32),
        cache_indices=slots,
        has_initial_state=has_initial,
        conv_states=conv_states,
        activation=activation,
        kernels=kernels,
        **lengths_by,
    )
    assert_close(out, expected, dtype)
    assert (out[:, cuts[4] : cuts[5]] == 0).all()
    assert torch.equal(conv_states.nan_to_num(9.0), expected_states.nan_to_num(9.0))


def test_defaults_are_those_of_the_form(kernels: Kernels) -> None:
    """None for causal_conv1d's arguments; "silu" for SGLang's, where a lone x is one sequence."""
    x, (weight, bias) = normal(2, 24, 9), make_conv(24, 4)
    plain = torch.stack([conv(history(row, 4), weight, bias, None) for row in x])
    activated = torch.stack([conv(history(row, 4), weight, bias, "silu") for row in x])
    assert_close(causal_conv1d_fn(x, weight, bias, kernels=kernels), plain, torch.float32)
    alone = causal_conv1d_fn(x[0], weight, bias, kernels=kernels)
    assert_close(alone, activated[0], torch.float32)
    conv_states = torch.full((2, 24, 3), math.nan)
    out = causal_conv1d_fn(x, weight, bias, conv_states=conv_states, kernels=kernels)
    assert_close(out, activated, torch.float32)
    assert torch.equal(conv_states, x[:, :, -3:])


@pytest.mark.parametrize("pad_slot_id", [PAD, 99])
def test_nothing_but_padding_changes_nothing(kernels: Kernels, pad_slot_id: int) -> None:
    x, (weight, bias) = normal(24, 9), make_conv(24, 4)
    conv_states = normal(3, 24, 3)
    before = conv_states.clone()
    out = causal_conv1d_fn(
        x,
        weight,
        bias,
        query_start_loc=torch.tensor([0, 4, 9]),
        cache_indices=torch.tensor([pad_slot_id, pad_slot_id]),
        conv_states=conv_states,
        pad_slot_id=pad_slot_id,
        kernels=kernels,
    )
    assert (out == 0).all() and torch.equal(conv_states, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("circular", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 4, 5])
@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("extra_columns", [0, 1, 7])
@pytest.mark.usefixtures("device")
def test_update(
    extra_columns: int,
    width: int,
    num_tokens: int,
    circular: bool,
    has_bias: bool,
    activation: str | None,
    dtype: torch.dtype,
) -> None:
    """Windows from exactly wide enough to wider than the tokens, in a circle or shifted."""
    dim, batch, state_len = 80, 3, width - 1 + extra_columns
    x = normal(batch, num_tokens, dim, dtype=dtype).mT
    conv_state = normal(batch, state_len, dim, dtype=dtype, seed=3).mT
    weight, bias = make_conv(dim, width, has_bias)
    seen = torch.tensor([0, 5, 1023], dtype=torch.int32) if circular else None
    expected_state = conv_state.clone()
    expected = []
    for i in range(batch):
        oldest = 0 if seen is None else int(seen[i]) % state_len
        ordered = conv_state[i].roll(-oldest, dims=1)
        columns = torch.cat([ordered, x[i]], dim=1)
        expected.append(conv(columns, weight, bias, activation)[:, -num_tokens:])
        shift = 0 if seen is None else oldest + num_tokens
        expected_state[i] = columns[:, num_tokens:].roll(shift, dims=1)
    out = causal_conv1d_update(x, conv_state, weight, bias, activation, cache_seqlens=seen)
    assert out.dtype == dtype
    assert_close(out, torch.stack(expected), dtype)
    assert torch.equal(conv_state, expected_state)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [2048, 2048 + 16, 4096])
@pytest.mark.usefixtures("device")
def test_update_of_one_column(dim: int, dtype: torch.dtype) -> None:
    x, conv_state = normal(4, dim, dtype=dtype), normal(4, dim, 3, dtype=dtype, seed=3)
    weight, bias = make_conv(dim, 4)
    columns = torch.cat([conv_state, x[..., None]], dim=2)
    expected = torch.stack([conv(row, weight, bias, "silu")[:, 0] for row in columns])
    assert_close(causal_conv1d_update(x, conv_state, weight, bias, "silu"), expected, dtype)
    assert torch.equal(conv_state, columns[:, :, 1:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("pad_slot_id", [PAD, 99])
@pytest.mark.parametrize(
    "indices", [[7, PAD, 0, 2, PAD], [PAD, PAD, 4, PAD, 1], [PAD] * 5, [0, 1, 2, 3, 4]]
)
@pytest.mark.usefixtures("device")
def test_update_with_padding(
    indices: list[int], pad_slot_id: int, index_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    """Padding rows are NaN; they come out as zero, and no slot changes that nobody names."""
    x, conv_state = normal(5, 24, dtype=dtype), normal(9, 24, 5, dtype=dtype, seed=3)
    weight, bias = make_conv(24, 4)
    expected_state = conv_state.clone()
    expected = torch.zeros(5, 24, dtype=torch.float64)
    for row, slot in enumerate(indices):
        if slot == PAD:
            x[row] = math.nan
            continue
        columns = torch.cat([conv_state[slot], x[row, :, None]], dim=1)
        expected[row] = conv(columns, weight, bias, "silu")[:, -1]
        expected_state[slot] = columns[:, 1:]
    given = torch.tensor([pad_slot_id if slot == PAD else slot for slot in indices])
    out = causal_conv1d_update(
        x,
        conv_state,
        weight,
        bias,
        True,
        conv_state_indices=given.to(index_dtype),
        pad_slot_id=pad_slot_id,
    )
    assert_close(out, expected, dtype)
    assert (out[torch.tensor(indices) == PAD] == 0).all()
    assert torch.equal(conv_state, expected_state)


# next_token, next_sibling and the parents that follow from them.
TREES = {
    "chain": ([1, 2, 3, 4, -1], [-1, -1, -1, -1, -1], [0, 0, 1, 2, 3]),
    "fan": ([1, -1, -1, -1, -1], [-1, 2, 3, 4, -1], [0, 0, 0, 0, 0]),
    "two levels": ([1, 3, -1, -1, -1], [-1, 2, -1, 4, -1], [0, 0, 0, 1, 1]),
    "two branches": ([1, 2, -1, 4, -1], [-1, 3, -1, -1, -1], [0, 0, 1, 0, 3]),
    "shorter": ([1, 2, -1, -1, -1], [-1, -1, -1, -1, -1], [0, 0, 1, 0, 0]),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tree", [None, *TREES])
@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("buffer_apart", [False, True])
@pytest.mark.usefixtures("device")
def test_draft_tokens_as_sglang_verifies_them(
    buffer_apart: bool, width: int, tree: str | None, dtype: torch.dtype
) -> None:
    """Trees, a padding row, buffer rows apart from the slots, one step more than is needed."""
    dim, batch, T = 24, 3, 5
    x = normal(batch, T, dim, dtype=dtype).mT
    x[1] = math.nan
    conv_state = normal(6, dim, width - 1, dtype=dtype, seed=3)
    before = conv_state.clone()
    indices = torch.tensor([4, PAD, 2], dtype=torch.int32)
    rows = torch.tensor([1, 0, 3], dtype=torch.int32) if buffer_apart else None
    windows = torch.full((6, T + 1, dim, width - 1), math.nan, dtype=dtype)
    weight, bias = make_conv(dim, width)
    found = torch.full((batch, T), 77, dtype=torch.int32)
    parents = list(range(-1, T - 1))
    of_tree = {}
    if tree is not None:
        next_token, next_sibling, parents = TREES[tree]
        of_tree = {
            "retrieve_next_token": torch.tensor([next_token] * batch, dtype=torch.int32),
            "retrieve_next_sibling": torch.tensor([next_sibling] * batch, dtype=torch.int32),
            "retrieve_parent_token": found,
        }
    out = causal_conv1d_update(
        x,
        conv_state,
        weight,
        bias,
        "silu",
        conv_state_indices=indices,
        intermediate_conv_window=windows,
        intermediate_state_indices=rows,
        **of_tree,
    )
    kept = indices if rows is None else rows
    for i in (0, 2):
        slot, row = int(indices[i]), int(kept[i])
        for t in range(T):
            path = [t]
            while path[0]:
                path.insert(0, parents[path[0]])
            columns = torch.cat([before[slot], x[i][:, path]], dim=1)[:, -width:]
            assert_close(out[i, :, t], conv(columns, weight, bias, "silu")[:, 0], dtype)
            assert torch.equal(windows[row, t], columns[:, 1:])
            windows[row, t] = math.nan
        assert torch.equal(conv_state[slot], x[i][:, T - width + 1 :])
        conv_state[slot] = before[slot]
        assert tree is None or found[i].tolist() == parents
    assert torch.isnan(windows).all() and torch.equal(conv_state, before)
    assert (out[1] == 0).all() and (found[1] == 77).all()


@pytest.mark.usefixtures("device")
def test_a_negative_buffer_row_keeps_nothing() -> None:
    x, conv_state = normal(2, 8, 3), normal(2, 8, 3, seed=3)
    windows = torch.full((1, 3, 8, 3), math.nan)
    causal_conv1d_update(
        x,
        conv_state,
        normal(8, 4),
        intermediate_conv_window=windows,
        intermediate_state_indices=torch.tensor([0, -1]),
    )
    assert torch.equal(windows[0, 2], x[0])


@pytest.mark.usefixtures("device")
def test_a_tree_goes_through_both_entries() -> None:
    """The parents that the convolution finds are those that selective_state_update takes."""
    next_token, next_sibling, parents = TREES["two branches"]
    found = torch.zeros(1, 5, dtype=torch.int64)
    causal_conv1d_update(
        normal(1, 8, 5),
        normal(1, 8, 3),
        normal(8, 4),
        retrieve_next_token=torch.tensor([next_token]),
        retrieve_next_sibling=torch.tensor([next_sibling]),
        retrieve_parent_token=found,
    )
    assert found[0].tolist() == parents


I32 = torch.int32


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("x", torch.zeros(3), ValueError),
        ("x", torch.zeros(2, 8, 6, dtype=torch.float64), TypeError),
        ("weight", torch.zeros(7, 4), ValueError),
        ("bias", torch.zeros(7), ValueError),
        ("activation", "relu", ValueError),
        ("seq_idx", torch.zeros(2, 5, dtype=I32), ValueError),
        ("seq_idx", torch.zeros(2, 6), TypeError),
        ("initial_states", torch.zeros(2, 8, 2), ValueError),
        ("conv_states", torch.zeros(2, 8, 4), ValueError),
        ("conv_states", torch.zeros(1, 8, 3), ValueError),
        ("query_start_loc", torch.tensor([0, 6], dtype=I32), ValueError),
        ("seq_lens_cpu", [6], ValueError),
        ("cache_indices", torch.zeros(1, dtype=I32), ValueError),
        ("cache_indices", torch.zeros(2, dtype=I32), ValueError),
    ],
)
def test_a_bad_argument_of_fn_is_named(name: str, value: Any, error: type[Exception]) -> None:
    args = {"x": torch.zeros(2, 8, 6), "weight": torch.zeros(8, 4), name: value}
    with pytest.raises(error, match=rf"^{name}\b"):
        causal_conv1d_fn(**args)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("query_start_loc", torch.tensor([0, 5]), ValueError),
        ("query_start_loc", torch.tensor([0.0, 6.0]), TypeError),
        ("seq_lens_cpu", [5], ValueError),
        ("seq_idx", torch.zeros(1, 6, dtype=I32), ValueError),
    ],
)
def test_a_bad_argument_of_packed_fn_is_named(
    name: str, value: Any, error: type[Exception]
) -> None:
    with pytest.raises(error, match=rf"^{name}\b"):
        causal_conv1d_fn(torch.zeros(8, 6), torch.zeros(8, 4), **{name: value})


def test_states_that_exclude_each_other_are_named() -> None:
    x, weight, states = torch.zeros(2, 8, 6), torch.zeros(8, 4), torch.zeros(2, 8, 3)
    seq_idx = torch.zeros(2, 6, dtype=I32)
    with pytest.raises(ValueError, match="initial_states"):
        causal_conv1d_fn(x, weight, initial_states=states, conv_states=states)
    with pytest.raises(ValueError, match="seq_idx"):
        causal_conv1d_fn(x, weight, seq_idx=seq_idx, initial_states=states)
    with pytest.raises(ValueError, match="return_final_states"):
        causal_conv1d_fn(x, weight, seq_idx=seq_idx, return_final_states=True)
    with pytest.raises(ValueError, match="final_states_out"):
        wrong = torch.zeros(2, 8, 2)
        causal_conv1d_fn(x, weight, return_final_states=True, final_states_out=wrong)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("x", torch.zeros(2), ValueError),
        ("conv_state", torch.zeros(2, 8, 2), ValueError),
        ("conv_state", torch.zeros(1, 8, 3), ValueError),
        ("weight", torch.zeros(8), ValueError),
        ("bias", torch.zeros(8, dtype=torch.int32), TypeError),
        ("activation", "gelu", ValueError),
        ("cache_seqlens", torch.zeros(3, dtype=I32), ValueError),
        ("conv_state_indices", torch.zeros(2), TypeError),
        ("intermediate_conv_window", torch.zeros(2, 4, 8, 3), ValueError),
        ("intermediate_conv_window", torch.zeros(2, 5, 8, 4), ValueError),
        ("intermediate_state_indices", torch.zeros(2, dtype=I32), ValueError),
        ("retrieve_next_token", torch.zeros(2, 5, dtype=I32), ValueError),
        ("retrieve_next_sibling", torch.zeros(2, 5, dtype=I32), ValueError),
    ],
)
def test_a_bad_argument_of_update_is_named(name: str, value: Any, error: type[Exception]) -> None:
    args = {"x": torch.zeros(2, 8, 5), "conv_state": torch.zeros(2, 8, 3)}
    args |= {"weight": torch.zeros(8, 4), name: value}
    with pytest.raises(error, match=rf"^{name}\b"):
        causal_conv1d_update(**args)
