"""Shapes of published models and random inputs for them, on the GPU."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from stateferry_kernels.draft_plans import ROOT, VerifyPlan, VerifySequence
from stateferry_kernels.layer_state import DraftRows, LayerState, SsmLayerParams
from stateferry_kernels.plans import (
    BoundaryWrite,
    CommitPlan,
    DecodePlan,
    ExtendPlan,
    ExtendSequence,
)

DEVICE = torch.device("cuda")
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Shape:
    """One Mamba-2 layer of a model, by its public config; chunk is the model's chunk_size."""

    name: str
    nheads: int
    headdim: int
    dstate: int
    ngroups: int
    chunk: int

    @property
    def conv_dim(self) -> int:
        return self.nheads * self.headdim + 2 * self.ngroups * self.dstate

    def state_bytes(self, dtype: torch.dtype) -> int:
        return self.nheads * self.headdim * self.dstate * dtype.itemsize

    @property
    def row_bytes(self) -> int:
        """x, B and dt of one row of a tail."""
        return 2 * self.nheads * self.headdim + 2 * self.ngroups * self.dstate + 4 * self.nheads


SHAPES = (
    Shape("Granite-4-H-Small", 128, 64, 128, 1, 256),
    Shape("Nemotron-Nano-9B-v2", 128, 80, 128, 8, 128),
    Shape("Falcon-H1-7B", 24, 128, 256, 1, 256),
    Shape("Mamba2-2.7B", 80, 64, 128, 1, 256),
)


@dataclass(frozen=True)
class Inputs:
    """Rows as a layer cuts them out of one activation: x, B and C are slices of the same rows."""

    x: torch.Tensor
    dt: torch.Tensor
    B: torch.Tensor
    C: torch.Tensor
    params: SsmLayerParams

    def named(self) -> dict[str, Any]:
        """By the names that peers give them."""
        p = self.params
        rows = {"x": self.x, "dt": self.dt, "B": self.B, "C": self.C, "z": None}
        return rows | {"A": p.A, "D": p.D, "dt_bias": p.dt_bias}


def make_inputs(shape: Shape, num_rows: int, seed: int = 0) -> Inputs:
    generator = torch.Generator(DEVICE).manual_seed(seed)

    def normal(*size: int, dtype: torch.dtype = DTYPE) -> torch.Tensor:
        return torch.randn(size, generator=generator, device=DEVICE, dtype=torch.float32).to(dtype)

    rows = normal(num_rows, shape.conv_dim)
    group = shape.ngroups * shape.dstate
    x, B, C = rows.split([shape.nheads * shape.headdim, group, group], dim=-1)
    return Inputs(
        x=x.unflatten(-1, (shape.nheads, shape.headdim)),
        dt=normal(num_rows, shape.nheads),
        B=B.unflatten(-1, (shape.ngroups, shape.dstate)),
        C=C.unflatten(-1, (shape.ngroups, shape.dstate)),
        params=SsmLayerParams(
            A=-torch.exp(normal(shape.nheads, dtype=torch.float32)),
            D=normal(shape.nheads, dtype=torch.float32),
            dt_bias=normal(shape.nheads, dtype=torch.float32) - 4,
            dt_softplus=True,
            dt_limit=(0.0, math.inf),
        ),
    )


def extend_plan(lengths: list[int], grid: int, snapshots: str) -> ExtendPlan:
    """Sequences from position 0. snapshots: "none" keeps the boundary to go on from alone, "one"
    another in the middle, "every" all of them."""
    sequences, slot = [], 1
    for page, length in enumerate(lengths):
        last = length // grid * grid
        points = {
            "none": [last],
            "one": sorted({length // 2 // grid * grid, last}),
            "every": list(range(grid, length + 1, grid)),
        }[snapshots]
        points = [point for point in points if point]
        writes = tuple(BoundaryWrite(point, slot + i) for i, point in enumerate(points))
        slot += len(writes)
        sequences.append(ExtendSequence(0, length, 0, page, writes))
    return ExtendPlan(grid, tuple(sequences))


def make_state(
    shape: Shape, num_slots: int, num_pages: int, grid: int, state_dtype: torch.dtype
) -> LayerState:
    """Random states and tails; slot 0 is zeros."""

    def pool(*size: int, dtype: torch.dtype = DTYPE) -> torch.Tensor:
        return torch.randn(size, device=DEVICE, dtype=dtype)

    state = LayerState(
        ssm_state=pool(num_slots, shape.nheads, shape.headdim, shape.dstate, dtype=state_dtype),
        conv_state=pool(num_slots, shape.conv_dim, 3),
        tail_xBC=pool(num_pages, grid, shape.conv_dim),
        tail_x=pool(num_pages, grid, shape.nheads, shape.headdim),
        tail_B=pool(num_pages, grid, shape.ngroups, shape.dstate),
        tail_dt=pool(num_pages, grid, shape.nheads, dtype=torch.float32).abs_().mul_(0.05),
    )
    state.ssm_state[0] = 0
    return state


def make_drafts(shape: Shape, num_pages: int, max_draft: int) -> DraftRows:
    def pool(*size: int, dtype: torch.dtype = DTYPE) -> torch.Tensor:
        return torch.empty((num_pages, max_draft, *size), device=DEVICE, dtype=dtype)

    return DraftRows(
        xBC=pool(shape.conv_dim),
        x=pool(shape.nheads, shape.headdim),
        B=pool(shape.ngroups, shape.dstate),
        dt=pool(shape.nheads, dtype=torch.float32),
    )


def tail_rows(batch: int, grid: int) -> list[int]:
    """Every tail length as often as another, in no order."""
    return [(37 * i + 5) % grid for i in range(batch)]


def decode_plan(slots: list[int], grid: int) -> DecodePlan:
    pages = tuple(range(len(slots)))
    return DecodePlan(grid, tuple(slots), pages, tuple(tail_rows(len(slots), grid)))


def commit_plan(slots: list[int], fresh: list[int], grid: int) -> CommitPlan:
    return CommitPlan(grid, tuple(slots), tuple(fresh), tuple(range(len(slots))))


def verify_plan(
    slots: list[int], grid: int, parents: tuple[int, ...], *, passing: bool = False
) -> VerifyPlan:
    """Drafts at all places of the grid; passing: those where paths pass a grid point, too, which
    take a state that is folded first."""
    longest = grid if passing else grid - len(parents)
    rows = [row % longest for row in tail_rows(len(slots), grid)]
    return VerifyPlan(
        grid,
        tuple(
            VerifySequence(slot, i, row, i, parents)
            for i, (slot, row) in enumerate(zip(slots, rows, strict=True))
        ),
    )


def chain(length: int) -> tuple[int, ...]:
    return (ROOT, *range(length - 1))


def tree_of_16() -> tuple[int, ...]:
    """Two children at each node, four deep, and one root more."""
    return (ROOT, ROOT, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, ROOT)
