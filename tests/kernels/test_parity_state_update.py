"""selective_state_update as mamba_ssm and SGLang call it, against the definition in fp64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from stateferry_kernels.operations import Kernels
from stateferry_kernels.parity import selective_state_update
from support.parity_backends import ALL_CASES, DEVICES, SMALL_CASES, Numbers, kernels_or_skip
from support.parity_reference import assert_close, step

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


def make_args(
    batch: int,
    nheads: int,
    dim: int,
    dstate: int,
    *,
    ngroups: int = 1,
    dtype: torch.dtype = torch.float32,
    num_tokens: int | None = None,
    tie_hdim: bool = True,
    with_z: bool = False,
    wide_BC: bool = True,
    seed: int = 0,
) -> dict[str, Any]:
    """All but the state, with heads; B and C are fp32 in mamba_ssm's tests whatever x is."""
    numbers = Numbers(seed)
    normal, uniform = numbers.normal, numbers.uniform
    rows = (batch,) if num_tokens is None else (batch, num_tokens)
    dtype_BC = torch.float32 if wide_BC else dtype
    per_head = (nheads, 1) if tie_hdim else (nheads, dim)
    A = (nheads, 1, 1) if tie_hdim else (nheads, dim, dstate)
    return {
        "x": normal(*rows, nheads, dim, dtype=dtype),
        "dt": normal(*rows, *per_head, dtype=dtype).expand(*rows, nheads, dim),
        "A": (-uniform(*A) - 1).expand(nheads, dim, dstate),
        "B": normal(*rows, ngroups, dstate, dtype=dtype_BC),
        "C": normal(*rows, ngroups, dstate, dtype=dtype_BC),
        "D": normal(*per_head).expand(nheads, dim),
        "z": normal(*rows, nheads, dim, dtype=dtype) if with_z else None,
        "dt_bias": (uniform(*per_head) - 4).expand(nheads, dim),
        "dt_softplus": True,
    }


def make_state(*size: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return Numbers(100 + seed).normal(*size, dtype=dtype)


def without_heads(args: dict[str, Any]) -> dict[str, Any]:
    """The same for one head, in the shapes of Mamba-1."""
    squeezed = {name: None if args[name] is None else args[name].squeeze(1) for name in "xzBC"}
    parameters = {name: args[name].squeeze(0) for name in ("A", "D", "dt_bias")}
    return {**args, **squeezed, **parameters, "dt": args["dt"].squeeze(1)}


def token(args: dict[str, Any], t: int) -> dict[str, Any]:
    """The arguments of one of several tokens."""
    names = ("x", "dt", "B", "C", "z")
    return args | {name: None if args[name] is None else args[name][:, t] for name in names}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_z", [False, True])
@pytest.mark.parametrize("dstate", [16, 32, 64])
@pytest.mark.parametrize("dim", [2048, 2048 + 16, 4096])
@pytest.mark.usefixtures("device")
def test_without_heads(dim: int, dstate: int, with_z: bool, dtype: torch.dtype) -> None:
    args = make_args(2, 1, dim, dstate, tie_hdim=False, with_z=with_z, dtype=dtype)
    state = make_state(2, dim, dstate, dtype=dtype)
    y, after = step(state[:, None], **args)
    out = selective_state_update(state, **without_heads(args))
    assert out.dtype == dtype
    assert_close(out, y[:, 0], dtype)
    assert_close(state, after[:, 0], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_z", [False, True])
@pytest.mark.parametrize("tie_hdim", [False, True])
@pytest.mark.parametrize("ngroups", [1, 2, 4])
@pytest.mark.parametrize("dstate", [16, 32, 64])
def test_with_heads(
    kernels: Kernels, dstate: int, ngroups: int, tie_hdim: bool, with_z: bool, dtype: torch.dtype
) -> None:
    options = {"ngroups": ngroups, "tie_hdim": tie_hdim, "with_z": with_z, "dtype": dtype}
    args = make_args(2, 32, 64, dstate, **options)
    state = make_state(2, 32, 64, dstate, dtype=dtype)
    y, after = step(state, **args)
    out = selective_state_update(state, **args, kernels=kernels)
    assert_close(out, y, dtype)
    assert_close(state, after, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("state_dtype", DTYPES)
@pytest.mark.parametrize("with_z", [False, True])
def test_one_dtype_goes_straight_to_the_kernel(
    kernels: Kernels, with_z: bool, state_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    args = make_args(3, 4, 20, 24, ngroups=2, with_z=with_z, dtype=dtype, wide_BC=False)
    state = make_state(3, 4, 20, 24, dtype=state_dtype)
    y, after = step(state, **args)
    assert_close(selective_state_update(state, **args, kernels=kernels), y, dtype)
    assert_close(state, after, state_dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tie_hdim", [False, True])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("pad_slot_id", [PAD, 77])
def test_batch_indices_with_padding(
    kernels: Kernels,
    pad_slot_id: int,
    index_dtype: torch.dtype,
    tie_hdim: bool,
    dtype: torch.dtype,
) -> None:
    """Padding rows are NaN and touch nothing; slots that nobody names keep their bytes."""
    args = make_args(6, 4, 24, 16, tie_hdim=tie_hdim, dtype=dtype, with_z=True)
    args["x"][[1, 4]] = math.nan
    indices = torch.tensor([7, pad_slot_id, 0, 12, pad_slot_id, 3], dtype=index_dtype)
    live = torch.tensor([0, 2, 3, 5])
    state = make_state(13, 4, 24, 16, dtype=dtype)
    before = state.clone()
    live_args = {n: args[n][live] if n in ("x", "dt", "B", "C", "z") else args[n] for n in args}
    y, after = step(state[indices[live].long()], **live_args)
    for out in (None, torch.full_like(args["x"], 5)):
        state.copy_(before)
        got = selective_state_update(
            state,
            **args,
            state_batch_indices=indices,
            pad_slot_id=pad_slot_id,
            out=out,
            kernels=kernels,
        )
        assert_close(got[live], y, dtype)
        assert (got[[1, 4]] == (0 if out is None else 5)).all()
        assert out is None or got is out
        assert_close(state[indices[live].long()], after, dtype)
        untouched = [slot for slot in range(13) if slot not in indices[live].tolist()]
        assert torch.equal(state[untouched], before[untouched])


def test_a_slot_pool_with_a_stride(kernels: Kernels) -> None:
    """The state is one layer of a pool of several."""
    args = make_args(2, 4, 8, 16)
    pool = make_state(2, 3, 4, 8, 16)
    expected = pool.clone()
    y, expected[:, 1] = step(pool[:, 1], **args)
    assert_close(selective_state_update(pool[:, 1], **args, kernels=kernels), y, torch.float32)
    assert_close(pool, expected, torch.float32)
    assert torch.equal(pool[:, ::2], make_state(2, 3, 4, 8, 16)[:, ::2])


@pytest.mark.parametrize("options", ["none", "no softplus", "no bias", "no D"])
def test_optional_parameters(kernels: Kernels, options: str) -> None:
    args = make_args(2, 4, 8, 16)
    args |= {
        "none": {},
        "no softplus": {"dt_softplus": False, "dt": args["dt"].abs()},
        "no bias": {"dt_bias": None},
        "no D": {"D": None},
    }[options]
    state = make_state(2, 4, 8, 16)
    y, after = step(state, **args)
    assert_close(selective_state_update(state, **args, kernels=kernels), y, torch.float32)
    assert_close(state, after, torch.float32)


def test_a_D_of_its_own_for_each_channel(kernels: Kernels) -> None:
    args = make_args(2, 4, 8, 16, with_z=True) | {"D": make_state(4, 8)}
    state = make_state(2, 4, 8, 16)
    y, after = step(state, **args)
    assert_close(selective_state_update(state, **args, kernels=kernels), y, torch.float32)
    assert_close(state, after, torch.float32)


CHAIN = [0, 0, 1, 2, 3]
TREE = [0, 0, 0, 1, 1]  # two children of the first token, two of the second
DEEP = [0, 0, 1, 0, 3]  # two branches of two

ROOTS = [-1, -1, 1, -1, 0]  # three drafts beside each other


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wide_BC", [False, True])
@pytest.mark.parametrize("parents", [None, CHAIN, TREE, DEEP, ROOTS])
@pytest.mark.parametrize("update", [False, True])
def test_draft_tokens_as_sglang_verifies_them(
    kernels: Kernels, update: bool, parents: list[int] | None, wide_BC: bool, dtype: torch.dtype
) -> None:
    check_draft(kernels, update, parents, wide_BC, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("parents", [None, TREE])
def test_small_draft(any_kernels: Kernels, parents: list[int] | None, dtype: torch.dtype) -> None:
    check_draft(any_kernels, True, parents, False, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_z", [False, True])
def test_small_step(any_kernels: Kernels, with_z: bool, dtype: torch.dtype) -> None:
    args = make_args(3, 4, 12, 16, ngroups=2, with_z=with_z, dtype=dtype, wide_BC=False)
    state = make_state(3, 4, 12, 16)
    y, after = step(state, **args)
    assert_close(selective_state_update(state, **args, kernels=any_kernels), y, dtype)
    assert_close(state, after, torch.float32)


def check_draft(
    kernels: Kernels, update: bool, parents: list[int] | None, wide_BC: bool, dtype: torch.dtype
) -> None:
    """A padding row, buffer rows apart from the slots, one step more than is needed."""
    T = 5
    args = make_args(3, 4, 12, 16, ngroups=2, dtype=dtype, num_tokens=T, wide_BC=wide_BC)
    args["x"][1] = math.nan
    indices = torch.tensor([4, PAD, 2], dtype=torch.int32)
    rows = torch.tensor([1, 0, 3], dtype=torch.int32)
    state = make_state(6, 4, 12, 16)
    before = state.clone()
    buffer = torch.full((4, T + 1, 4, 12, 16), math.nan)
    tree = None if parents is None else torch.tensor([parents] * 3, dtype=torch.int32)
    out = selective_state_update(
        state,
        **args,
        state_batch_indices=indices,
        disable_state_update=not update,
        intermediate_states_buffer=buffer,
        cache_steps=T + 1,
        retrieve_parent_token=tree,
        intermediate_state_indices=rows,
        kernels=kernels,
    )
    live = [0, 2]
    states: list[torch.Tensor] = []
    for t in range(T):
        parent = t - 1 if parents is None else parents[t]
        start = before[indices[live].long()] if t == 0 or parent < 0 else states[parent]
        per_token = ("x", "dt", "B", "C")
        at_t = {n: token(args, t)[n][live] if n in per_token else args[n] for n in args}
        y, after = step(start, **at_t)
        states.append(after)
        assert_close(out[live, t], y, dtype)
        assert_close(buffer[rows[live].long(), t], after, torch.float32)
    assert torch.isnan(buffer[[0, 2]]).all() and torch.isnan(buffer[:, T]).all()
    assert (out[1] == 0).all()
    if update:
        assert_close(state[indices[live].long()], states[-1], torch.float32)
        before[indices[live].long()] = state[indices[live].long()]
    assert torch.equal(state, before)


def test_the_buffer_rows_are_the_slots_by_default(kernels: Kernels) -> None:
    args = make_args(2, 4, 8, 16, num_tokens=2)
    state, buffer = make_state(3, 4, 8, 16), torch.full((3, 2, 4, 8, 16), math.nan)
    indices = torch.tensor([2, 0], dtype=torch.int32)
    selective_state_update(
        state,
        **args,
        state_batch_indices=indices,
        intermediate_states_buffer=buffer,
        kernels=kernels,
    )
    assert torch.equal(buffer[[2, 0], 1], state[[2, 0]])
    assert torch.isnan(buffer[1]).all()


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("state", torch.zeros(2, 4), ValueError),
        ("state", torch.zeros(2, 4, 16, 8).mT, ValueError),
        ("state", torch.zeros(1, 4, 8, 16), ValueError),
        ("x", torch.zeros(2, 4, 9), ValueError),
        ("dt", torch.zeros(2, 4, 9), ValueError),
        ("A", torch.zeros(4), ValueError),
        ("B", torch.zeros(2, 3, 16), ValueError),
        ("C", torch.zeros(2, 2, 16), ValueError),
        ("D", torch.zeros(4), ValueError),
        ("z", torch.zeros(2, 4, 8, dtype=torch.int32), TypeError),
        ("dt_bias", torch.zeros(4, 9), ValueError),
        ("out", torch.zeros(2, 4, 9), ValueError),
        ("state_batch_indices", torch.zeros(3, dtype=torch.int32), ValueError),
        ("state_batch_indices", torch.zeros(2), TypeError),
        ("retrieve_parent_token", torch.zeros(2, 1, dtype=torch.int32), ValueError),
        ("intermediate_state_indices", torch.zeros(2, dtype=torch.int32), ValueError),
        ("intermediate_states_buffer", torch.zeros(2, 1, 4, 8), ValueError),
        ("intermediate_states_buffer", torch.zeros(2, 0, 4, 8, 16), ValueError),
    ],
)
def test_a_bad_argument_is_named(name: str, value: object, error: type[Exception]) -> None:
    args = {"state": torch.zeros(2, 4, 8, 16), **make_args(2, 4, 8, 16), name: value}
    with pytest.raises(error, match=rf"^{name}\b"):
        selective_state_update(**args)


def test_what_channels_of_their_own_cannot_have_is_named() -> None:
    state = torch.zeros(2, 4, 8, 16)
    one = make_args(2, 4, 8, 16, tie_hdim=False)
    with pytest.raises(ValueError, match="disable_state_update"):
        selective_state_update(state, **one, disable_state_update=True)
    with pytest.raises(ValueError, match="intermediate_states_buffer"):
        selective_state_update(state, **one, intermediate_states_buffer=torch.zeros(2, 1, 4, 8, 16))
    with pytest.raises(ValueError, match="x: several tokens"):
        selective_state_update(state, **make_args(2, 4, 8, 16, tie_hdim=False, num_tokens=2))


def test_cache_steps_must_be_the_buffer_s() -> None:
    buffer = torch.zeros(2, 3, 4, 8, 16)
    with pytest.raises(ValueError, match="cache_steps"):
        selective_state_update(
            torch.zeros(2, 4, 8, 16),
            **make_args(2, 4, 8, 16),
            intermediate_states_buffer=buffer,
            cache_steps=4,
        )
