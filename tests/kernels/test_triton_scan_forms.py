"""The Triton chunk scan's own kernels give the bytes of the grid form's walk: interpreted here, on
the GPU where there is one."""

from __future__ import annotations

import os
from dataclasses import fields, replace
from typing import Any

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

pytest.importorskip("triton")

from stateferry_kernels.dispatch import select_kernels  # noqa: E402
from stateferry_kernels.ssd import triton_scan  # noqa: E402
from stateferry_kernels.ssd.triton_ops import chunk_scan  # noqa: E402
from stateferry_kernels.ssd.triton_scan_tiles import SplitTile, scan_tile  # noqa: E402
from support.ssm_case import (  # noqa: E402
    Layer,
    Shape,
    Tokens,
    Walker,
    make_layer,
    make_tokens,
    relative_error,
)

TILES = {
    "a head at a time": SplitTile(32, 16, 4, 1, 1, 32, 0, 16, 4),
    "heads together": SplitTile(32, 16, 4, 3, 2, 16, 16, 16, 4)
    if DEVICE == "cpu"
    else SplitTile(16, 16, 4, 3, 2, 16, 16, 16, 4),
}
# The interpreter's products are numpy's, whose order depends on the tile: these have the walk's.
ALIKE = (TILES["a head at a time"],)
each_tile = pytest.mark.parametrize("tile", TILES.values(), ids=TILES)
SMALL = Shape(nheads=2, headdim=20, dstate=12, ngroups=1, grid=16)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def on_device(thing: Any) -> Any:
    """A copy of a dataclass of tensors, with a pool's stride between slots."""
    if isinstance(thing, torch.Tensor):
        flat = torch.empty_strided(thing.shape, thing.stride(), dtype=thing.dtype, device=DEVICE)
        return flat.copy_(thing)
    if hasattr(thing, "__dataclass_fields__"):
        names = [field.name for field in fields(thing) if field.init]
        return replace(thing, **{name: on_device(getattr(thing, name)) for name in names})
    return thing


def device_walker(layer: Layer, num_sequences: int) -> Walker:
    kernels = replace(select_kernels("torch"), chunk_scan=chunk_scan)
    walker = Walker(on_device(layer), num_sequences, kernels)
    walker.state = on_device(walker.state)
    return walker


def extends(walker: Walker, layer: Layer, with_z: bool) -> list[torch.Tensor]:
    """Outputs of two sequences: begun within an interval, ended within one and at a grid point."""
    grid, device = layer.shape.grid, walker.state.tail_x.device
    outputs = []
    for step, lengths in enumerate([(5, 2 * grid), (2 * grid, 1)]):
        parts = []
        for i, length in enumerate(lengths):
            new = make_tokens(layer, length, seed=10 * step + i, with_z=with_z)
            moved = (None if t is None else t.to(device) for t in (new.xBC, new.dt, new.z))
            parts.append(Tokens(*moved))
        outputs += [part.xBC for part in walker.extend(parts, every_boundary=step == 1)]
    return outputs


def pools(walker: Walker) -> dict[str, torch.Tensor]:
    names = ("ssm_state", "tail_x", "tail_B", "tail_dt")
    return {name: getattr(walker.state, name) for name in names}


def assert_same_bytes(one: Walker, other: Walker) -> None:
    for name, pool in pools(one).items():
        theirs = pools(other)[name]
        assert torch.equal(pool.isnan(), theirs.isnan()), name
        assert torch.equal(pool.nan_to_num(), theirs.nan_to_num()), name


@each_tile
@pytest.mark.parametrize(
    ("dtype", "state_dtype", "with_z"),
    [
        (torch.float32, torch.float32, True),
        (torch.bfloat16, torch.float32, False),
        (torch.bfloat16, torch.bfloat16, True),
    ],
    ids=["fp32", "bf16", "bf16 state"],
)
def test_bytes_of_the_walk(
    monkeypatch: pytest.MonkeyPatch,
    tile: SplitTile,
    dtype: torch.dtype,
    state_dtype: torch.dtype,
    with_z: bool,
) -> None:
    layer = make_layer(SMALL, dtype=dtype, state_dtype=state_dtype)
    monkeypatch.setattr(triton_scan, "scan_tile", lambda *shape: tile)
    ours = device_walker(layer, 2)
    y = extends(ours, layer, with_z)
    if DEVICE == "cuda" or tile in ALIKE:
        monkeypatch.setattr(triton_scan, "scan_tile", lambda *shape: None)
        walked = device_walker(layer, 2)
        for a, b in zip(y, extends(walked, layer, with_z), strict=True):
            assert torch.equal(a, b)
        assert_same_bytes(ours, walked)
    wanted = Walker(layer, 2, select_kernels("reference"))
    tolerance = TOLERANCE[torch.bfloat16 if torch.bfloat16 in (dtype, state_dtype) else dtype]
    for a, b in zip(y, extends(wanted, layer, with_z), strict=True):
        assert relative_error(a.cpu(), b) < tolerance
    for name, pool in pools(ours).items():
        theirs = pools(wanted)[name]
        assert torch.equal(pool.isnan().cpu(), theirs.isnan()), name
        assert relative_error(pool.nan_to_num().cpu(), theirs.nan_to_num()) < tolerance, name


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device: served tiles are not tested")
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("grid", [64, 128])
@pytest.mark.parametrize(
    ("nheads", "headdim", "dstate", "ngroups"),
    [(16, 64, 128, 1), (16, 80, 128, 2), (6, 128, 256, 1)],
)
def test_served_tiles_give_the_bytes_of_the_walk(
    monkeypatch: pytest.MonkeyPatch,
    nheads: int,
    headdim: int,
    dstate: int,
    ngroups: int,
    grid: int,
    state_dtype: torch.dtype,
) -> None:
    assert scan_tile(2, headdim, dstate, grid, nheads // ngroups) is not None
    shape = Shape(nheads, headdim, dstate, ngroups, grid=grid)
    layer = make_layer(shape, dtype=torch.bfloat16, state_dtype=state_dtype)
    ours, walked = device_walker(layer, 2), device_walker(layer, 2)
    y = extends(ours, layer, True)
    monkeypatch.setattr(triton_scan, "scan_tile", lambda *shape: None)
    for a, b in zip(y, extends(walked, layer, True), strict=True):
        assert torch.equal(a, b) and not a.isnan().any()
    assert_same_bytes(ours, walked)


def test_tiles_are_for_shapes_that_were_tried() -> None:
    tile = scan_tile(2, 80, 128, 64, per_group=6)
    assert tile is not None and tile.heads == 2
    small = scan_tile(2, 64, 128, 16, per_group=8)
    assert small is not None and small.block_rows == 16
    assert scan_tile(2, 64, 128, 256, per_group=8) is None
    assert scan_tile(2, 72, 128, 64, per_group=8) is None
    assert scan_tile(4, 64, 128, 64, per_group=8) is None
    few, many = (scan_tile(2, 64, 128, 64, per_group=8, work=work) for work in (80, 97))
    assert few is not None and many is not None and few.starts_headdim < many.starts_headdim
    assert scan_tile(2, 64, 128, 64, per_group=8) == many
    with pytest.raises(ValueError, match="miscompiles"):
        SplitTile(64, 64, 4, 3, 1, 64, 0, 64, 4)
    with pytest.raises(ValueError, match="miscompiles"):
        SplitTile(32, 64, 4, 3, 1, 64, 0, 64, 4, 2)


@pytest.mark.parametrize("headdim", [16, 64, 81])
def test_a_rest_is_for_heads_that_leave_one(monkeypatch: pytest.MonkeyPatch, headdim: int) -> None:
    """The first block is read without a mask: 64 rows of a state of 16 were an illegal read."""
    served = scan_tile(2, 80, 128, 128, per_group=4)
    assert served is not None and served.rest == 16
    served.check_covers(80)
    monkeypatch.setattr(triton_scan, "scan_tile", lambda *shape: served)
    layer = make_layer(Shape(4, headdim, 32, 2, grid=16), dtype=torch.bfloat16)
    walker = device_walker(layer, 2)
    with pytest.raises(ValueError, match=f"not for headdim {headdim}"):
        extends(walker, layer, False)
