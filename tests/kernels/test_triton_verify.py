"""A verification's own kernels: the bytes of the walk, for every shape of draft; interpreted here,
at served shapes on the GPU where there is one."""

from __future__ import annotations

import os

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

pytest.importorskip("triton")

from stateferry_kernels.draft_plans import ROOT, VerifyPlan, VerifySequence  # noqa: E402
from stateferry_kernels.layer_state import STATE_DTYPES  # noqa: E402
from stateferry_kernels.state_update import triton_ops  # noqa: E402
from stateferry_kernels.state_update.triton_tables import draft_tables  # noqa: E402
from support.ssm_case import Shape, all_pools, make_layer  # noqa: E402
from support.triton_walker import device_walker, tokens_of  # noqa: E402

SHAPES = [Shape(nheads=2, headdim=20, dstate=12, ngroups=1, grid=16)]
if DEVICE == "cuda":
    SHAPES += [
        Shape(nheads=16, headdim=64, dstate=128, ngroups=1, grid=64),
        Shape(nheads=32, headdim=80, dstate=128, ngroups=2, grid=64),
        Shape(nheads=6, headdim=128, dstate=256, ngroups=1, grid=64),
        Shape(nheads=6, headdim=64, dstate=128, ngroups=1, grid=128),
    ]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s.headdim}x{s.dstate}")
CHAIN = (ROOT, 0, 1, 2)
TREE = (ROOT, ROOT, 0, 1, 2, 3, 3, 5, 4)
# Rows of a tail before the draft, counted back from the grid: far from it; a chain that ends at it;
# paths that pass it, some of which part before and some after.
TO_GRID = (14, 5, 4, 3, 2, 1)


def test_tables_of_a_path_that_passes_the_grid_and_one_that_does_not() -> None:
    sequences = (
        VerifySequence(5, 0, 15, 3, CHAIN),
        VerifySequence(6, 1, 2, 4, CHAIN),
        VerifySequence(7, 2, 14, 1, (ROOT, ROOT, 0, 2, 1, 4)),
    )
    tables = draft_tables(VerifyPlan(16, sequences), torch.device("cpu"))
    assert tables.walks.walks.tolist() == [[0, 2], [2, 3], [3, 7]]
    assert tables.places.tolist() == [
        [3, 0, -1, 0],
        [3, 0, 0, -1],
        [4, 4, -1, -1],
        [1, 8, -1, 1],
        [1, 8, 1, -1],
        [1, 8, -1, 2],
        [1, 8, 2, -1],
    ]
    assert tables.ends.tolist() == [[0, 5], [3, 7], [5, 7]]


@each_shape
@pytest.mark.parametrize("state_dtype", STATE_DTYPES, ids=["fp32 state", "bf16 state"])
@pytest.mark.parametrize("parents", [CHAIN, TREE], ids=["chain", "tree"])
def test_the_bytes_are_the_walks(
    monkeypatch: pytest.MonkeyPatch,
    shape: Shape,
    state_dtype: torch.dtype,
    parents: tuple[int, ...],
) -> None:
    layer = make_layer(shape, dtype=torch.bfloat16, state_dtype=state_dtype)
    folded: list[int] = []
    launch = triton_ops.launch_verify

    def counted(tables: object, *rest: object) -> None:
        folded.append(len(tables.ends))  # type: ignore[attr-defined]
        launch(tables, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(triton_ops, "launch_verify", counted)
    results = []
    for with_walk in (False, True):
        walker = device_walker(layer, len(TO_GRID))
        starts = [2 * shape.grid - rest for rest in TO_GRID]
        walker.extend([tokens_of(layer, n, seed=n) for n in starts])
        drafts = [tokens_of(layer, len(parents), seed=100 + n) for n in range(len(TO_GRID))]
        if with_walk:
            monkeypatch.setattr(triton_ops, "decode_tile", lambda *_: None)
        outputs = walker.verify([(draft, parents) for draft in drafts])
        results.append([*outputs, *all_pools(walker.state, walker.drafts).values()])
    # Once, for paths that pass the grid; the walk was really another one.
    assert len(folded) == 1
    assert folded[0] >= 3
    for one, other in zip(*results, strict=True):
        assert torch.equal(one.isnan(), other.isnan())
        assert torch.equal(one.nan_to_num(), other.nan_to_num())


@each_shape
def test_company_does_not_matter(shape: Shape) -> None:
    layer = make_layer(shape, dtype=torch.bfloat16)
    starts = [2 * shape.grid - rest for rest in TO_GRID[:3]]
    before = [tokens_of(layer, n, seed=n) for n in starts]
    drafts = [(tokens_of(layer, len(p), seed=50 + len(p)), p) for p in (CHAIN, TREE, CHAIN[:1])]
    together = device_walker(layer, 3)
    together.extend(before)
    outputs = together.verify(drafts)
    for number in range(3):
        alone = device_walker(layer)
        alone.extend([before[number]])
        [output] = alone.verify([drafts[number]])
        assert torch.equal(output, outputs[number])
