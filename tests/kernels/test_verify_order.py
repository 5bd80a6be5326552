"""Every node of a draft tree has the bits that an extend along its own path gives."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stateferry_kernels.draft_plans import ROOT
from stateferry_kernels.operations import Kernels
from stateferry_kernels.plans import CommitPlan
from support.backends import each_activation, each_backend, each_dtype, kernels_of, torch_threads
from support.random_walk import Choose, paths_of, poison_unused, random_tree
from support.ssm_case import (
    MAX_DRAFT,
    Layer,
    Shape,
    Tokens,
    Walker,
    all_pools,
    make_layer,
    make_tokens,
)


def joined(*parts: Tokens) -> Tokens:
    z = [part.z for part in parts if part.z is not None]
    return Tokens(
        torch.cat([part.xBC for part in parts]),
        torch.cat([part.dt for part in parts]),
        torch.cat(z),
    )


def picked(tokens: Tokens, rows: tuple[int, ...]) -> Tokens:
    assert tokens.z is not None
    return Tokens(tokens.xBC[list(rows)], tokens.dt[list(rows)], tokens.z[list(rows)])


def assert_nodes(
    kernels: Kernels, layer: Layer, position: int, parents: list[int], path: tuple[int, ...] = ()
) -> int:
    """Verifies a draft, accepts ``path`` and goes on for some tokens; all against extends. Returns
    how many branches passed the grid."""
    before = make_tokens(layer, position, seed=1, with_z=True)
    draft = make_tokens(layer, len(parents), seed=2, with_z=True)
    walker = Walker(layer, kernels=kernels)
    if position:
        walker.extend([before])
    poison_unused(walker)
    kept = {name: pool.clone() for name, pool in all_pools(walker.state, walker.drafts).items()}
    [y] = walker.verify([(draft, parents)])
    for name, pool in all_pools(walker.state, walker.drafts).items():
        if not name.startswith("draft_"):
            assert torch.equal(pool.nan_to_num(99.0), kept[name].nan_to_num(99.0)), name
    paths = paths_of(parents)
    inner = set(parents)
    for node, along in enumerate(paths):
        if node in inner:
            continue
        alone = Walker(layer, kernels=kernels)
        [output] = alone.extend([joined(before, picked(draft, along))])
        assert torch.equal(y[list(along)], output.xBC[position:]), along
    if path:
        after = make_tokens(layer, 11, seed=3, with_z=True)
        walker.accept([path])
        poison_unused(walker)
        rows = [walker.decode([after[t : t + 1]]) for t in range(5)]
        [last] = walker.extend([after[5:]])
        alone = Walker(layer, kernels=kernels)
        [output] = alone.extend([joined(before, picked(draft, path), after)])
        assert torch.equal(torch.cat([*rows, last.xBC]), output.xBC[position + len(path) :])
    room = layer.shape.grid - position % layer.shape.grid
    return len({along[:room] for along in paths if len(along) > room})


@each_backend
@each_dtype
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_any_node_of_any_tree(
    backend: str, dtype: torch.dtype, state_dtype: torch.dtype, data: st.DataObject
) -> None:
    grid = data.draw(st.sampled_from([8, 16, 64]))
    layer = make_layer(Shape(grid=grid), dtype=dtype, state_dtype=state_dtype, seed=5)

    def choose(low: int, high: int) -> int:
        return data.draw(st.integers(low, high))

    position = choose(0, 40)
    parents = random_tree(choose, grid, choose(1, MAX_DRAFT))
    path = paths_of(parents)[choose(0, len(parents) - 1)]
    assert_nodes(kernels_of(backend), layer, position, parents, path)


BRANCHES = [ROOT, ROOT, 0, 1, 2, 3, 3, 5, 4, 8, 6]


@each_backend
@each_dtype
@pytest.mark.parametrize("rows", range(8))
def test_branches_that_pass_the_grid_apart(
    backend: str, dtype: torch.dtype, state_dtype: torch.dtype, rows: int
) -> None:
    layer = make_layer(Shape(grid=8), dtype=dtype, state_dtype=state_dtype)
    for path in ((1, 3, 5, 7), (0, 2, 4, 8, 9), (1,)):
        branches = assert_nodes(kernels_of(backend), layer, 8 + rows, BRANCHES, path)
        # Depths: 5 along one branch, 4 along two others that part after two nodes.
        assert branches == {7: 2, 6: 2, 5: 3, 4: 1}.get(rows, 0)


@each_backend
@each_activation
def test_a_path_as_long_as_the_grid(backend: str, dtype: torch.dtype) -> None:
    layer = make_layer(Shape(grid=8), dtype=dtype)
    chain = [ROOT, *range(7)]
    for rows in range(8):
        branches = assert_nodes(kernels_of(backend), layer, 16 + rows, chain, tuple(range(8)))
        assert branches == (rows > 0)


@each_backend
@each_activation
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_drafts_in_company_on_any_threads(backend: str, dtype: torch.dtype, threads: int) -> None:
    # Large enough that the library really splits it.
    shape = Shape(nheads=6, headdim=40, dstate=64, ngroups=2, grid=8)
    layer, kernels = make_layer(shape, dtype=dtype), kernels_of(backend)
    choose: Choose = random.Random(4).randint
    trees = [random_tree(choose, shape.grid, 5 + 3 * k) for k in range(3)]
    drafts = [make_tokens(layer, len(tree), seed=k) for k, tree in enumerate(trees)]
    starts = [make_tokens(layer, 6 + k, seed=9 + k) for k in range(3)]
    paths = [paths_of(tree)[-1] for tree in trees]

    def run(numbers: list[int]) -> tuple[list[torch.Tensor], Walker]:
        walker = Walker(layer, len(numbers), kernels)
        walker.extend([starts[n] for n in numbers])
        outputs = walker.verify([(drafts[n], trees[n]) for n in numbers])
        walker.accept([paths[n] for n in numbers])
        return outputs, walker

    with torch_threads(threads):
        outputs, walker = run([2, 0, 1])
    for place, number in enumerate([2, 0, 1]):
        [expected], alone = run([number])
        assert torch.equal(outputs[place], expected)
        for a, b in zip(walker.tail(place), alone.tail(0), strict=True):
            assert torch.equal(a, b)
        assert walker.boundaries[place].keys() == alone.boundaries[0].keys()
        for point, slot in walker.boundaries[place].items():
            theirs = alone.boundaries[0][point]
            assert torch.equal(walker.state.ssm_state[slot], alone.state.ssm_state[theirs])
            assert torch.equal(walker.state.conv_state[slot], alone.state.conv_state[theirs])


@each_backend
@each_dtype
@pytest.mark.parametrize("position", [1, 2, 5, 8, 9, 10, 15])
def test_a_partial_commit_reaches_back_into_the_source(
    backend: str, dtype: torch.dtype, state_dtype: torch.dtype, position: int
) -> None:
    kernels, shape = kernels_of(backend), Shape(grid=8)
    layer = make_layer(shape, dtype=dtype, state_dtype=state_dtype)
    tokens = make_tokens(layer, position)
    walker = Walker(layer, kernels=kernels)
    walker.extend([tokens])
    rows = position % shape.grid
    if not rows:
        return
    poison_unused(walker)
    plan = CommitPlan(shape.grid, (walker.slots[0],), (30,), (0,), (rows,))
    kernels.commit(params=layer.ssm, plan=plan, state=walker.state)
    columns = torch.cat([torch.zeros(3, shape.conv_dim, dtype=dtype), tokens.xBC])[-3:]
    assert torch.equal(walker.state.conv_state[30], columns.T)
    assert torch.isfinite(walker.state.ssm_state[30]).all()
    assert math.isfinite(float(walker.state.ssm_state[30].float().norm()))
