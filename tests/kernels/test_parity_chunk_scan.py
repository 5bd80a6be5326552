"""mamba_chunk_scan_combined as mamba_ssm and SGLang call it, against the definition in fp64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from stateferry_kernels.operations import Kernels
from stateferry_kernels.parity import mamba_chunk_scan_combined
from support.parity_backends import ALL_CASES, SMALL_CASES, Numbers, kernels_or_skip
from support.parity_reference import Scan, assert_close, scan

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CHUNK = 64


@pytest.fixture(params=ALL_CASES)
def kernels(request: pytest.FixtureRequest) -> Iterator[Kernels]:
    yield from kernels_or_skip(request.param)


@pytest.fixture(params=SMALL_CASES)
def any_kernels(request: pytest.FixtureRequest) -> Iterator[Kernels]:
    yield from kernels_or_skip(request.param)


@dataclass(frozen=True)
class Case:
    """Arguments by the names that the entry gives them."""

    args: dict[str, Any]
    dtype: torch.dtype

    def reference(self, row: int, begin: int, end: int, initial: int | None = None) -> Scan:
        """The definition on tokens [begin, end) of a batch row."""
        per_token = {name: self.args[name][row, begin:end] for name in ("x", "dt", "B", "C")}
        per_token["z"] = None if self.args["z"] is None else self.args["z"][row, begin:end]
        options = {name: self.args[name] for name in ("D", "dt_bias", "dt_softplus", "dt_limit")}
        state = None if initial is None else self.args["initial_states"][initial]
        return scan(A=self.args["A"], initial_state=state, **per_token, **options)


def make_case(
    batch: int,
    seqlen: int,
    *,
    dtype: torch.dtype = torch.float32,
    nheads: int = 8,
    headdim: int = 16,
    ngroups: int = 2,
    dstate: int = 16,
    num_initial: int = 0,
    with_z: bool = False,
    D: str | None = "head",
    dt_limit: tuple[float, float] = (0.0, math.inf),
    seed: int = 0,
) -> Case:
    numbers = Numbers(seed)

    def normal(*size: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return numbers.normal(*size, dtype=dtype)

    per_head = {"head": (nheads,), "channel": (nheads, headdim)}
    initial = normal(num_initial, nheads, headdim, dstate, dtype=torch.float32)
    return Case(
        dtype=dtype,
        args={
            "x": normal(batch, seqlen, nheads, headdim),
            "dt": normal(batch, seqlen, nheads),
            "A": -torch.exp(normal(nheads, dtype=torch.float32)),
            "B": normal(batch, seqlen, ngroups, dstate),
            "C": normal(batch, seqlen, ngroups, dstate),
            "D": None if D is None else normal(*per_head[D], dtype=torch.float32),
            "z": normal(batch, seqlen, nheads, headdim) if with_z else None,
            "dt_bias": normal(nheads, dtype=torch.float32) - 2,
            "dt_softplus": True,
            "dt_limit": dt_limit,
            "initial_states": initial if num_initial else None,
        },
    )


def cumulative(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk_size", [64, 128])
@pytest.mark.parametrize("seqlen", [1, 63, 64, 65, 200])
def test_batch(kernels: Kernels, seqlen: int, chunk_size: int, dtype: torch.dtype) -> None:
    case = make_case(2, seqlen, dtype=dtype)
    y, final = mamba_chunk_scan_combined(
        **case.args, chunk_size=chunk_size, return_final_states=True, kernels=kernels
    )
    expected = [case.reference(row, 0, seqlen) for row in range(2)]
    assert y.dtype == dtype and final.dtype == torch.float32
    assert_close(y, torch.stack([scan.y for scan in expected]), dtype)
    assert_close(final, torch.stack([scan.states[-1] for scan in expected]), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ngroups", [1, 2, 8])
@pytest.mark.parametrize("with_z", [False, True])
@pytest.mark.parametrize("D", [None, "head", "channel"])
def test_options(
    kernels: Kernels, D: str | None, with_z: bool, ngroups: int, dtype: torch.dtype
) -> None:
    options = {"ngroups": ngroups, "with_z": with_z, "D": D, "headdim": 12, "dstate": 20}
    case = make_case(1, 100, dtype=dtype, num_initial=1, dt_limit=(0.05, 0.4), **options)
    y = mamba_chunk_scan_combined(**case.args, chunk_size=CHUNK, kernels=kernels)
    assert_close(y[0], case.reference(0, 0, 100, initial=0).y, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ngroups", [1, 2, 8])
@pytest.mark.parametrize("chunk_size", [64, 128])
def test_varlen_states(kernels: Kernels, chunk_size: int, ngroups: int, dtype: torch.dtype) -> None:
    """mamba_ssm's test of varlen states: many sequences of random lengths, none aligned."""
    lengths = Numbers(chunk_size + ngroups).integers(1, 200, 10)
    case = make_case(1, sum(lengths), dtype=dtype, ngroups=ngroups, dstate=32)
    seq_idx = torch.repeat_interleave(torch.arange(10), torch.tensor(lengths))[None].int()
    y, final, varlen = mamba_chunk_scan_combined(
        **case.args,
        chunk_size=chunk_size,
        seq_idx=seq_idx,
        cu_seqlens=cumulative(lengths),
        return_final_states=True,
        return_varlen_states=True,
        kernels=kernels,
    )
    expected = [case.reference(0, b, e) for b, e in pairwise(cumulative(lengths).tolist())]
    assert_close(y[0], torch.cat([scan.y for scan in expected]), dtype)
    assert_close(varlen, torch.stack([scan.states[-1] for scan in expected]), torch.float32)
    assert torch.equal(final[0], varlen[-1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "lengths",
    [[1], [64], [5, 59, 64, 1], [100, 28, 0, 70], [0, 3], [200], [63, 1, 65, 127]],
)
def test_packed_with_initial_states_as_sglang_calls_it(
    kernels: Kernels, lengths: list[int], dtype: torch.dtype
) -> None:
    case = make_case(1, sum(lengths), dtype=dtype, num_initial=len(lengths))
    check_packed(case, lengths, CHUNK, kernels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_z", [False, True])
@pytest.mark.parametrize("lengths", [[16], [5, 11, 0, 17], [33, 1]])
def test_small_packed(
    any_kernels: Kernels, lengths: list[int], with_z: bool, dtype: torch.dtype
) -> None:
    options = {"num_initial": len(lengths), "with_z": with_z, "nheads": 2, "ngroups": 1}
    case = make_case(1, sum(lengths), dtype=dtype, **options)
    check_packed(case, lengths, 16, any_kernels)


def check_packed(case: Case, lengths: list[int], chunk_size: int, kernels: Kernels) -> None:
    """All that SGLang asks for: y into ``out``, and three kinds of states."""
    out = torch.full_like(case.args["x"], math.nan)
    states, final, varlen = mamba_chunk_scan_combined(
        **case.args,
        chunk_size=chunk_size,
        cu_seqlens=cumulative(lengths),
        out=out,
        return_final_states=True,
        return_varlen_states=True,
        return_intermediate_states=True,
        kernels=kernels,
    )
    cuts = cumulative(lengths).tolist()
    expected = [case.reference(0, b, e, i) for i, (b, e) in enumerate(pairwise(cuts))]
    assert_close(out[0], torch.cat([scan.y for scan in expected]), case.dtype)
    assert_close(varlen, torch.stack([scan.states[-1] for scan in expected]), torch.float32)
    assert torch.equal(final[0], varlen[-1])
    before_chunks = []
    for edge in range(0, sum(lengths), chunk_size):
        holder = max(i for i, begin in enumerate(cuts[:-1]) if begin <= edge < cuts[i + 1])
        before_chunks.append(expected[holder].states[edge - cuts[holder]])
    assert_close(states[0], torch.stack(before_chunks), torch.float32)


@pytest.mark.parametrize("seqlen", [64, 150])
def test_intermediate_states_of_a_batch(kernels: Kernels, seqlen: int) -> None:
    case = make_case(2, seqlen, num_initial=2)
    y, states = mamba_chunk_scan_combined(
        **case.args, chunk_size=CHUNK, return_intermediate_states=True, kernels=kernels
    )
    expected = [case.reference(row, 0, seqlen, row) for row in range(2)]
    assert_close(y, torch.stack([scan.y for scan in expected]), torch.float32)
    edges = [torch.stack(scan.states[0:seqlen:CHUNK]) for scan in expected]
    assert_close(states, torch.stack(edges), torch.float32)


def test_seq_idx_alone_cuts_the_rows(kernels: Kernels) -> None:
    """The initial state is that of sequence 0, and a row that begins with another has none."""
    case = make_case(2, 90, num_initial=2)
    cuts = [[0, 20, 84, 90], [0, 64, 90]]
    seq_idx = torch.zeros(2, 90, dtype=torch.int32)
    seq_idx[0, 20:84], seq_idx[0, 84:], seq_idx[1, :64], seq_idx[1, 64:] = 1, 2, 3, 4
    y, final = mamba_chunk_scan_combined(
        **case.args,
        chunk_size=CHUNK,
        seq_idx=seq_idx,
        return_final_states=True,
        kernels=kernels,
    )
    for row in range(2):
        initial = [0 if row == 0 and begin == 0 else None for begin in cuts[row][:-1]]
        pieces = zip(pairwise(cuts[row]), initial, strict=True)
        expected = [case.reference(row, b, e, i) for (b, e), i in pieces]
        assert_close(y[row], torch.cat([scan.y for scan in expected]), torch.float32)
        assert_close(final[row], expected[-1].states[-1], torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_inputs_and_output(kernels: Kernels, dtype: torch.dtype) -> None:
    """x, B and C are slices of one row, as a layer cuts them; out is a slice too."""
    case = make_case(2, 70, dtype=dtype)
    nheads, headdim, ngroups, dstate = 8, 16, 2, 16
    names = ("x", "B", "C")
    row = torch.cat([case.args[name].flatten(2) for name in names], dim=-1)
    sizes = [nheads * headdim, ngroups * dstate, ngroups * dstate]
    shapes = [(nheads, headdim), (ngroups, dstate), (ngroups, dstate)]
    slices = {
        name: part.unflatten(-1, shape)
        for name, part, shape in zip(names, row.split(sizes, dim=-1), shapes, strict=True)
    }
    out = torch.full((2, 70, 2 * nheads, headdim), math.nan, dtype=dtype)[:, :, :nheads]
    returned = mamba_chunk_scan_combined(
        **{**case.args, **slices}, chunk_size=CHUNK, out=out, kernels=kernels
    )
    assert returned is None
    assert_close(out, torch.stack([case.reference(r, 0, 70).y for r in range(2)]), dtype)


def test_packing_changes_no_bit(kernels: Kernels) -> None:
    lengths = [70, 5, 64]
    case = make_case(1, sum(lengths), num_initial=3)
    options = {"chunk_size": CHUNK, "return_varlen_states": True, "kernels": kernels}
    y, ends = mamba_chunk_scan_combined(**case.args, cu_seqlens=cumulative(lengths), **options)
    for i, (begin, end) in enumerate(pairwise(cumulative(lengths).tolist())):
        alone = {name: case.args[name][:, begin:end] for name in ("x", "dt", "B", "C")}
        alone["initial_states"] = case.args["initial_states"][i : i + 1]
        cu_seqlens = cumulative([end - begin])
        y_alone, end_alone = mamba_chunk_scan_combined(
            **{**case.args, **alone}, cu_seqlens=cu_seqlens, **options
        )
        assert torch.equal(y_alone[0], y[0, begin:end])
        assert torch.equal(end_alone[0], ends[i])


def test_what_is_returned(kernels: Kernels) -> None:
    case = make_case(1, 10)
    cu_seqlens = cumulative([4, 6])

    def call(**options: Any) -> Any:
        return mamba_chunk_scan_combined(
            **case.args, chunk_size=8, cu_seqlens=cu_seqlens, kernels=kernels, **options
        )

    y = call()
    out = torch.empty_like(y)
    assert isinstance(y, torch.Tensor)
    assert len(call(return_final_states=True)) == 2
    assert len(call(return_varlen_states=True)) == 2
    assert len(call(return_final_states=True, return_varlen_states=True)) == 3
    assert call(out=out) is None and torch.equal(out, y)
    assert call(out=out, return_final_states=True).shape == (1, 8, 16, 16)
    assert call(out=out, return_varlen_states=True).shape == (2, 8, 16, 16)
    assert call(out=out, return_intermediate_states=True).shape == (1, 2, 8, 16, 16)
    both = call(out=out, return_intermediate_states=True, return_varlen_states=True)
    assert [part.shape[0] for part in both] == [1, 2]
    kept = call(out=out, return_varlen_states=True, state_dtype=torch.bfloat16)
    assert kept.dtype == torch.bfloat16


def test_no_tokens(kernels: Kernels) -> None:
    case = make_case(1, 0, num_initial=2)
    y, states, varlen = mamba_chunk_scan_combined(
        **case.args,
        chunk_size=CHUNK,
        cu_seqlens=torch.tensor([0, 0, 0]),
        return_varlen_states=True,
        return_intermediate_states=True,
        kernels=kernels,
    )
    assert y.shape[1] == 0 and states.shape[1] == 0
    assert torch.equal(varlen, case.args["initial_states"])


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("x", torch.zeros(1, 10, 8), ValueError),
        ("dt", torch.zeros(1, 9, 8), ValueError),
        ("A", torch.zeros(7), ValueError),
        ("B", torch.zeros(1, 10, 3, 16), ValueError),
        ("C", torch.zeros(1, 10, 2, 15), ValueError),
        ("D", torch.zeros(8, 15), ValueError),
        ("z", torch.zeros(1, 10, 8, 16, dtype=torch.float64), TypeError),
        ("dt_bias", torch.zeros(1), ValueError),
        ("initial_states", torch.zeros(2, 8, 16, 16), ValueError),
        ("seq_idx", torch.zeros(1, 9, dtype=torch.int32), ValueError),
        ("seq_idx", torch.zeros(1, 10), TypeError),
        ("cu_seqlens", torch.tensor([0, 9]), ValueError),
        ("cu_seqlens", torch.tensor([0, 6, 4, 10]), ValueError),
        ("chunk_size", 0, ValueError),
        ("return_varlen_states", True, ValueError),
        ("dt_limit", (1.0, 0.0), ValueError),
    ],
)
def test_a_bad_argument_is_named(name: str, value: object, error: type[Exception]) -> None:
    case = make_case(1, 10)
    case = replace(case, args={"chunk_size": 8, **case.args, name: value})
    with pytest.raises(error, match=rf"^{name}\b"):
        mamba_chunk_scan_combined(**case.args)
