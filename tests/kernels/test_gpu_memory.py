"""The served shapes of the grid form on a GPU touch no memory but their own: pools, inputs and
outputs lie between guards, and once more without any under compute-sanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from stateferry_kernels.dispatch import select_kernels
from stateferry_kernels.layer_state import PAD_SLOT, LayerState
from stateferry_kernels.plans import (
    BoundaryWrite,
    CommitPlan,
    DecodePlan,
    ExtendPlan,
    ExtendSequence,
)
from stateferry_kernels.ssd import triton_scan
from stateferry_kernels.ssd.triton_scan_tiles import scan_tile
from support.ssm_case import Layer, Shape, make_layer, split_active

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(),
        reason="needs a CUDA device: reads and writes past tensors are NOT looked for here",
    ),
]

SERVED = [(16, 64, 128, 1), (16, 80, 128, 2), (6, 128, 256, 1)]
SLOTS, PAGES = 12, 5
GUARD = 1 << 15
# NaNs that no arithmetic makes: read they show in results, overwritten in the guard.
PATTERN = {torch.float32: 0x7FC54321, torch.bfloat16: 0x7FC5}
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16}


class Arena:
    """Tensors between guards."""

    def __init__(self, guard: int) -> None:
        self._guard = guard
        self._whole: list[torch.Tensor] = []

    def place(self, tensor: torch.Tensor) -> torch.Tensor:
        whole = self._blank(tensor.numel(), tensor.dtype)
        inner = whole[self._guard : len(whole) - self._guard].view(tensor.shape)
        return inner.copy_(tensor)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Full of NaN, like what was never written."""
        whole = self._blank(torch.Size(shape).numel(), dtype)
        return whole[self._guard : len(whole) - self._guard].view(shape)

    def check(self) -> None:
        torch.cuda.synchronize()
        for whole in self._whole:
            bits = whole.view(BITS[whole.dtype])
            ends = torch.cat([bits[: self._guard], bits[len(bits) - self._guard :]])
            assert bool((ends == PATTERN[whole.dtype]).all()), "a guard was overwritten"

    def _blank(self, size: int, dtype: torch.dtype) -> torch.Tensor:
        bits = torch.full((size + 2 * self._guard,), PATTERN[dtype], dtype=BITS[dtype])
        self._whole.append(bits.cuda().view(dtype))
        return self._whole[-1]


def on_gpu(thing: Any) -> Any:
    if isinstance(thing, torch.Tensor):
        return thing.cuda()
    if hasattr(thing, "__dataclass_fields__"):
        names = [field.name for field in fields(thing) if field.init]
        return replace(thing, **{name: on_gpu(getattr(thing, name)) for name in names})
    return thing


def run(layer: Layer, arena: Arena) -> list[torch.Tensor]:
    """Everything serving does with a layer, at odd places: in the pool's last slot and page, from
    within an interval, with padding beside. Returns outputs and pools."""
    shape, grid = layer.shape, layer.shape.grid
    dtype, kernels = layer.dtype, select_kernels("triton")
    layer = on_gpu(layer)
    heads = (shape.nheads, shape.headdim)
    state = LayerState(
        ssm_state=arena.empty((SLOTS, *heads, shape.dstate), layer.state_dtype),
        conv_state=arena.empty((SLOTS, shape.conv_dim, shape.d_conv - 1), dtype),
        tail_xBC=arena.empty((PAGES, grid, shape.conv_dim), dtype),
        tail_x=arena.empty((PAGES, grid, *heads), dtype),
        tail_B=arena.empty((PAGES, grid, shape.ngroups, shape.dstate), dtype),
        tail_dt=arena.empty((PAGES, grid, shape.nheads), torch.float32),
    )
    state.ssm_state[0], state.conv_state[0] = 0, 0
    generator = torch.Generator().manual_seed(3)
    outputs: list[torch.Tensor] = []

    def call(conv: Callable[..., None], ssm: Callable[..., None], plan: Any, rows: int) -> None:
        drawn = torch.randn(
            rows, shape.conv_dim + shape.nheads + shape.d_inner, generator=generator
        )
        xBC, dt, z = (
            arena.place(part.to(dtype))
            for part in drawn.split([shape.conv_dim, shape.nheads, shape.d_inner], dim=1)
        )
        active = arena.empty(xBC.shape, dtype)
        conv(xBC, conv=layer.conv, plan=plan, state=state, out=active)
        x, B, C = split_active(active, shape)
        y = arena.empty((rows, *heads), dtype)
        gate = z.view(rows, *heads)
        ssm(x, dt, B, C, params=layer.ssm, plan=plan, state=state, out=y, z=gate)
        outputs.append(y)

    def extend(*sequences: ExtendSequence) -> None:
        plan = ExtendPlan(grid, sequences)
        call(kernels.causal_conv1d_extend, kernels.chunk_scan, plan, plan.total_tokens)

    last = SLOTS - 1
    extend(
        ExtendSequence(0, 1, 0, PAGES - 1),
        ExtendSequence(0, grid - 1, 0, 0),
        ExtendSequence(0, 3 * grid + 5, 0, 1, (BoundaryWrite(3 * grid, last),)),
        ExtendSequence(0, grid, 0, 2, (BoundaryWrite(grid, 1),)),
    )
    extend(
        ExtendSequence(3 * grid + 5, 2 * grid - 5, last, 1, (BoundaryWrite(5 * grid, 2),)),
        ExtendSequence(1, grid + 6, 0, PAGES - 1, (BoundaryWrite(grid, last - 1),)),
        ExtendSequence(grid, 7, 1, 2),
    )
    slots = (PAD_SLOT, last - 1, 2, PAD_SLOT, 1, 0)
    plan = DecodePlan(grid, slots, (0, PAGES - 1, 1, 0, 2, 0), (0, 7, 0, 0, 7, grid - 1))
    call(kernels.causal_conv1d_row, kernels.decode_row, plan, len(slots))
    outputs[-1] = outputs[-1][[i for i, slot in enumerate(slots) if slot != PAD_SLOT]]
    commits = CommitPlan(grid, (0, last - 1), (last - 2, 3), (0, PAGES - 1), (grid, 8))
    kernels.commit(params=layer.ssm, plan=commits, state=state)
    assert not any(y.isnan().any() for y in outputs)
    arena.check()
    pools = (state.ssm_state, state.conv_state, state.tail_xBC, state.tail_x, state.tail_B)
    return [tensor.clone().view(BITS[tensor.dtype]) for tensor in (*outputs, *pools, state.tail_dt)]


@pytest.mark.parametrize("guard", [GUARD, 0], ids=["guarded", "bare"])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("grid", [48, 64, 128])
@pytest.mark.parametrize(("nheads", "headdim", "dstate", "ngroups"), SERVED)
def test_nothing_past_a_tensor(
    monkeypatch: pytest.MonkeyPatch,
    nheads: int,
    headdim: int,
    dstate: int,
    ngroups: int,
    grid: int,
    state_dtype: torch.dtype,
    guard: int,
) -> None:
    """And the bytes are those of the walk, in pools as well, whose unwritten parts stay."""
    assert scan_tile(2, headdim, dstate, grid, nheads // ngroups) is not None
    shape = Shape(nheads, headdim, dstate, ngroups, grid=grid)
    layer = make_layer(shape, dtype=torch.bfloat16, state_dtype=state_dtype)
    ours = run(layer, Arena(guard))
    monkeypatch.setattr(triton_scan, "scan_tile", lambda *shape: None)
    for one, other in zip(ours, run(layer, Arena(guard)), strict=True):
        assert torch.equal(one, other)


def test_sanitized() -> None:
    """Each tensor an allocation of its own, so that a read past one is seen, too."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        pytest.skip("no compute-sanitizer here: reads past tensors are NOT looked for")
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", "--print-limit", "3"]
    command += [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    # A worker of xdist that runs this has told its own process things.
    command += ["-p", "no:xdist", "-o", "filterwarnings=default"]
    ours = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command += ["-k", "nothing_past and bare and fp32 and not 48", str(Path(__file__))]
    result = subprocess.run(
        command,
        env=ours | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-3000:]
    assert "6 passed" in result.stdout and "0 errors" in result.stdout
