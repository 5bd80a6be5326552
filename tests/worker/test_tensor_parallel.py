"""State cut for one tensor-parallel group is the state of every other group, to the byte."""

from __future__ import annotations

import itertools
from functools import cache

import pytest
import torch

from stateferry.core.errors import ConfigError, FrameError
from stateferry.worker.tensor_parallel import Cut, cut_of, join, overlaps, take
from stateferry_kernels.kv_layer import KvGeometry
from stateferry_kernels.layer_state import StateGeometry

ROWS = 5
DEGREES = (1, 2, 4)


def geometry(nheads: int, headdim: int, dstate: int, ngroups: int) -> StateGeometry:
    return StateGeometry(
        num_layers=1,
        nheads=nheads,
        headdim=headdim,
        dstate=dstate,
        ngroups=ngroups,
        d_conv=4,
        conv_dim=nheads * headdim + 2 * ngroups * dstate,
    )


# As the public models have them: heads, headdim, dstate, groups; KV heads and their size.
LAYOUTS = {
    "Mamba2-2.7B": (geometry(80, 64, 128, 1), KvGeometry(0, 0, 0)),
    "Nemotron-Nano-9B-v2": (geometry(128, 80, 128, 8), KvGeometry(1, 8, 128)),
    "Falcon-H1-7B": (geometry(24, 128, 256, 1), KvGeometry(1, 2, 128)),
    "Bamba-9B": (geometry(128, 64, 128, 1), KvGeometry(1, 8, 128)),
    "two groups": (geometry(8, 16, 16, 2), KvGeometry(1, 1, 32)),
}


@cache
def whole_state(name: str) -> dict[str, torch.Tensor]:
    """Every kind of segment, of one layer, in random bytes: NaN is among them."""
    state, kv = LAYOUTS[name]
    shapes = {
        "ssm_state": ((state.nheads, state.headdim, state.dstate), torch.float32),
        "conv_state": ((state.conv_dim, state.d_conv - 1), torch.bfloat16),
        "tail_xBC": ((ROWS, state.conv_dim), torch.bfloat16),
        "tail_x": ((ROWS, state.nheads, state.headdim), torch.bfloat16),
        "tail_B": ((ROWS, state.ngroups, state.dstate), torch.bfloat16),
        "tail_dt": ((ROWS, state.nheads), torch.float32),
    }
    if kv.num_layers:
        shapes["kv_pages"] = ((3, 2, kv.kv_heads, 16, kv.head_dim), torch.bfloat16)
        shapes["kv_rows"] = ((2, kv.kv_heads, ROWS, kv.head_dim), torch.bfloat16)
    generator = torch.Generator().manual_seed(1)
    whole = {}
    for kind, (shape, dtype) in shapes.items():
        size_bytes = torch.empty(shape, dtype=dtype).nbytes
        raw = torch.randint(0, 256, (size_bytes,), dtype=torch.uint8, generator=generator)
        whole[kind] = raw.view(dtype).view(shape)
    return whole


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    assert one.shape == other.shape and one.dtype == other.dtype
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def cuts_of(name: str, kind: str, degree: int) -> list[Cut]:
    return [cut_of(kind, rank, degree, *LAYOUTS[name]) for rank in range(degree)]


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("degree", DEGREES)
def test_joined_shares_are_the_whole(name: str, degree: int) -> None:
    for kind, whole in whole_state(name).items():
        cuts = cuts_of(name, kind, degree)
        assert same(join([take(whole, cut) for cut in cuts], cuts), whole), kind


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(("theirs", "ours"), [*itertools.product(DEGREES, DEGREES)])
def test_ranks_of_one_group_fill_those_of_another(name: str, theirs: int, ours: int) -> None:
    for kind, whole in whole_state(name).items():
        senders = cuts_of(name, kind, theirs)
        shares = [take(whole, cut) for cut in senders]
        for cut in cuts_of(name, kind, ours):
            wanted = take(whole, cut)
            filled = torch.zeros_like(wanted)
            for share, sender in zip(shares, senders, strict=True):
                for here, there, length in overlaps(cut, sender):
                    piece = share.narrow(cut.dim, there, length)
                    filled.narrow(cut.dim, here, length).copy_(piece)
            assert same(filled, wanted), kind


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("degree", DEGREES)
def test_a_rank_has_the_groups_of_its_heads(name: str, degree: int) -> None:
    state, kv = LAYOUTS[name]
    heads_per_group = state.nheads // state.ngroups
    for rank in range(degree):
        [heads] = cut_of("ssm_state", rank, degree, state, kv).ranges
        [groups] = cut_of("tail_B", rank, degree, state, kv).ranges
        assert {head // heads_per_group for head in heads} == set(groups)


def test_x_b_and_c_of_a_column_are_cut_one_by_one() -> None:
    state, kv = LAYOUTS["two groups"]
    cut = cut_of("conv_state", 1, 2, state, kv)
    assert cut.ranges == (range(64, 128), range(144, 160), range(176, 192))


def test_one_group_is_everybodys() -> None:
    state, kv = LAYOUTS["Mamba2-2.7B"]
    cuts = [cut_of("tail_B", rank, 4, state, kv) for rank in range(4)]
    assert {cut.ranges for cut in cuts} == {(range(1),)}


def test_copies_that_differ_are_refused() -> None:
    whole = whole_state("Mamba2-2.7B")["tail_B"]
    cuts = cuts_of("Mamba2-2.7B", "tail_B", 2)
    shares = [take(whole, cut) for cut in cuts]
    shares[1] = shares[1].clone()
    shares[1].view(torch.uint8)[0, 0, 3] ^= 1
    with pytest.raises(FrameError, match="rank 1 differs"):
        join(shares, cuts)


def test_a_share_of_another_size_or_a_missing_rank_is_refused() -> None:
    whole = whole_state("two groups")["tail_dt"]
    cuts = cuts_of("two groups", "tail_dt", 2)
    shares = [take(whole, cut) for cut in cuts]
    with pytest.raises(FrameError, match="rank 1 sent"):
        join([shares[0], shares[1][:, :1]], cuts)
    with pytest.raises(FrameError, match="gap"):
        join(shares[1:], cuts[1:])


def test_heads_that_do_not_divide() -> None:
    state, kv = LAYOUTS["Falcon-H1-7B"]
    with pytest.raises(ConfigError, match="nheads = 24"):
        cut_of("ssm_state", 0, 16, state, kv)
    with pytest.raises(ConfigError, match="rank 2 of 2"):
        cut_of("ssm_state", 2, 2, state, kv)
    with pytest.raises(FrameError, match="no part"):
        cut_of("hidden", 0, 1, state, kv)
