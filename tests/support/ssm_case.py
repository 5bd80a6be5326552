"""Random layers and sequences for kernel tests, over pools that are full of NaN."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from stateferry_kernels.dispatch import select_kernels
from stateferry_kernels.draft_plans import (
    AcceptPlan,
    AcceptSequence,
    VerifyPlan,
    VerifySequence,
)
from stateferry_kernels.layer_state import (
    PAD_SLOT,
    ZERO_SLOT,
    ConvParams,
    DraftRows,
    LayerState,
    SsmLayerParams,
)
from stateferry_kernels.operations import Kernels
from stateferry_kernels.plans import (
    BoundaryWrite,
    CommitPlan,
    DecodePlan,
    ExtendPlan,
    ExtendSequence,
)

NUM_SLOTS = 40
NUM_PAGES = 12
MAX_DRAFT = 16


@dataclass(frozen=True)
class Shape:
    nheads: int = 4
    headdim: int = 16
    dstate: int = 16
    ngroups: int = 2
    d_conv: int = 4
    grid: int = 32

    @property
    def d_inner(self) -> int:
        return self.nheads * self.headdim

    @property
    def conv_dim(self) -> int:
        return self.d_inner + 2 * self.ngroups * self.dstate


@dataclass(frozen=True)
class Layer:
    """Parameters of the convolution and of the recurrence."""

    shape: Shape
    conv: ConvParams
    ssm: SsmLayerParams
    dtype: torch.dtype
    state_dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Tokens:
    """Inputs of one sequence: raw columns (seqlen, conv_dim), raw dt (seqlen, nheads), and z."""

    xBC: torch.Tensor
    dt: torch.Tensor
    z: torch.Tensor | None

    def __len__(self) -> int:
        return len(self.xBC)

    def __getitem__(self, rows: slice) -> Tokens:
        return Tokens(self.xBC[rows], self.dt[rows], None if self.z is None else self.z[rows])


def make_layer(
    shape: Shape,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    state_dtype: torch.dtype = torch.float32,
    with_D: bool = True,
    with_dt_bias: bool = True,
    with_conv_bias: bool = True,
    dt_limit: tuple[float, float] = (0.0, math.inf),
) -> Layer:
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator)

    return Layer(
        shape=shape,
        conv=ConvParams(
            weight=normal(shape.conv_dim, shape.d_conv).to(dtype),
            bias=normal(shape.conv_dim).to(dtype) if with_conv_bias else None,
        ),
        ssm=SsmLayerParams(
            A=-torch.exp(normal(shape.nheads)),
            D=normal(shape.nheads) if with_D else None,
            dt_bias=normal(shape.nheads) - 2 if with_dt_bias else None,
            dt_softplus=True,
            dt_limit=dt_limit,
        ),
        dtype=dtype,
        state_dtype=state_dtype,
    )


def make_tokens(layer: Layer, length: int, *, seed: int = 0, with_z: bool = False) -> Tokens:
    generator = torch.Generator().manual_seed(1000 + seed)
    shape = layer.shape

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator).to(layer.dtype)

    return Tokens(
        xBC=normal(length, shape.conv_dim),
        dt=normal(length, shape.nheads),
        z=normal(length, shape.nheads, shape.headdim) if with_z else None,
    )


def poisoned_state(layer: Layer) -> LayerState:
    """Pools of NaN with a stride between slots, as in a pool of several layers; zeros in slot 0."""
    s, dtype = layer.shape, layer.dtype

    def pool(*size: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.full((size[0], 2, *size[1:]), math.nan, dtype=dtype)[:, 1]

    state = LayerState(
        ssm_state=pool(NUM_SLOTS, s.nheads, s.headdim, s.dstate, dtype=layer.state_dtype),
        conv_state=pool(NUM_SLOTS, s.conv_dim, s.d_conv - 1),
        tail_xBC=pool(NUM_PAGES, s.grid, s.conv_dim),
        tail_x=pool(NUM_PAGES, s.grid, s.nheads, s.headdim),
        tail_B=pool(NUM_PAGES, s.grid, s.ngroups, s.dstate),
        tail_dt=pool(NUM_PAGES, s.grid, s.nheads, dtype=torch.float32),
    )
    state.ssm_state[ZERO_SLOT] = 0
    state.conv_state[ZERO_SLOT] = 0
    return state


def poisoned_drafts(layer: Layer) -> DraftRows:
    """Draft pages of NaN, strided as in a pool of several layers."""
    s = layer.shape

    def pool(*size: int, dtype: torch.dtype = layer.dtype) -> torch.Tensor:
        return torch.full((NUM_PAGES, 2, MAX_DRAFT, *size), math.nan, dtype=dtype)[:, 1]

    return DraftRows(
        xBC=pool(s.conv_dim),
        x=pool(s.nheads, s.headdim),
        B=pool(s.ngroups, s.dstate),
        dt=pool(s.nheads, dtype=torch.float32),
    )


def all_pools(state: LayerState, drafts: DraftRows) -> dict[str, torch.Tensor]:
    """Every pool by name."""
    named = {n: getattr(state, n) for n in LayerState.__slots__ if n != "cache"}
    return named | {f"draft_{n}": getattr(drafts, n) for n in DraftRows.__slots__ if n != "cache"}


class Walker:
    """Moves some sequences through one layer, as an engine would. Keeps every boundary's slot."""

    def __init__(
        self, layer: Layer, num_sequences: int = 1, kernels: Kernels | None = None
    ) -> None:
        self.layer = layer
        self.kernels = kernels or select_kernels("torch")
        self.state = poisoned_state(layer)
        self.drafts = poisoned_drafts(layer)
        self.positions = [0] * num_sequences
        self.slots = [ZERO_SLOT] * num_sequences
        self.boundaries: list[dict[int, int]] = [{} for _ in range(num_sequences)]
        self._next_slot = 1

    def extend(self, tokens: Sequence[Tokens | None], every_boundary: bool = True) -> list[Tokens]:
        """One packed extend; None leaves a sequence out. Returns y as ``Tokens.xBC`` per sequence
        that took part: (length, nheads * headdim)."""
        plan_rows, taking_part = [], []
        grid = self.layer.shape.grid
        for number, new in enumerate(tokens):
            if new is None:
                continue
            start, end = self.positions[number], self.positions[number] + len(new)
            points = [p for p in range(grid, end + 1, grid) if p > start]
            points = points if every_boundary else points[-1:]
            writes = tuple(BoundaryWrite(p, self._fresh_slot()) for p in points)
            plan_rows.append(ExtendSequence(start, len(new), self.slots[number], number, writes))
            taking_part.append(number)
            self.boundaries[number] |= {w.position: w.state_slot for w in writes}
        packed = [new for new in tokens if new is not None]
        plan = ExtendPlan(grid, tuple(plan_rows))
        y = self._run(packed, plan)
        for number, row in zip(taking_part, plan_rows, strict=True):
            self.positions[number] = row.end
            if row.boundaries:
                self.slots[number] = row.boundaries[-1].state_slot
        return [Tokens(part, part, None) for part in y.split([len(p) for p in packed])]

    def decode(self, tokens: Sequence[Tokens]) -> torch.Tensor:
        """One row per sequence, with the commits that follow. Returns y (num_seqs, d_inner)."""
        grid = self.layer.shape.grid
        plan = DecodePlan(
            grid,
            tuple(self.slots),
            tuple(range(len(self.slots))),
            tuple(position % grid for position in self.positions),
        )
        y = self._run(list(tokens), plan)
        self.positions = [position + 1 for position in self.positions]
        full = [n for n, position in enumerate(self.positions) if position % grid == 0]
        if full:
            fresh = [self._fresh_slot() for _ in full]
            sources = tuple(self.slots[n] for n in full)
            self.kernels.commit(
                params=self.layer.ssm,
                plan=CommitPlan(grid, sources, tuple(fresh), tuple(full)),
                state=self.state,
            )
            for number, slot in zip(full, fresh, strict=True):
                self.slots[number] = slot
                self.boundaries[number][self.positions[number]] = slot
        return y

    def verify(self, drafts: Sequence[tuple[Tokens, Sequence[int]]]) -> list[torch.Tensor]:
        """Evaluate a draft (tokens, parents) of each sequence. Returns y (num_nodes, d_inner)
        each."""
        rows = zip(self.slots, self.positions, drafts, strict=True)
        grid = self.layer.shape.grid
        plan = VerifyPlan(
            grid,
            tuple(
                VerifySequence(slot, number, position % grid, number, tuple(parents))
                for number, (slot, position, (_, parents)) in enumerate(rows)
            ),
        )
        y = self._run([tokens for tokens, _ in drafts], plan)
        return list(y.split([len(tokens) for tokens, _ in drafts]))

    def accept(self, paths: Sequence[Sequence[int]]) -> None:
        """Keep one path of each sequence's last draft; an empty one keeps nothing."""
        grid, kept = self.layer.shape.grid, []
        for number, path in enumerate(paths):
            rows, slot = self.positions[number] % grid, PAD_SLOT
            if not path:
                continue
            if rows + len(path) >= grid:
                slot = self._fresh_slot()
            kept.append(AcceptSequence(self.slots[number], number, rows, number, tuple(path), slot))
            self.positions[number] += len(path)
            if slot != PAD_SLOT:
                self.slots[number] = slot
                self.boundaries[number][self.positions[number] // grid * grid] = slot
        plan = AcceptPlan(grid, tuple(kept))
        self.kernels.accept(params=self.layer.ssm, plan=plan, state=self.state, drafts=self.drafts)

    def tail(self, number: int) -> list[torch.Tensor]:
        """The rows of a sequence's tail that count."""
        rows = self.positions[number] % self.layer.shape.grid
        s = self.state
        return [t[number, :rows].clone() for t in (s.tail_xBC, s.tail_x, s.tail_B, s.tail_dt)]

    def _run(
        self, packed: list[Tokens], plan: ExtendPlan | DecodePlan | VerifyPlan
    ) -> torch.Tensor:
        xBC = torch.cat([tokens.xBC for tokens in packed])
        dt = torch.cat([tokens.dt for tokens in packed])
        gates = [tokens.z for tokens in packed if tokens.z is not None]
        joined = Tokens(xBC, dt, torch.cat(gates) if gates else None)
        _, y = layer_pass(self.kernels, self.layer, joined, plan, self.state, self.drafts)
        return y

    def _fresh_slot(self) -> int:
        self._next_slot += 1
        return self._next_slot - 1


def layer_pass(
    kernels: Kernels,
    layer: Layer,
    tokens: Tokens,
    plan: ExtendPlan | DecodePlan | VerifyPlan,
    state: LayerState,
    drafts: DraftRows,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Convolution and recurrence of one layer, into outputs full of NaN. Returns the activated
    columns (num_rows, conv_dim) and y (num_rows, d_inner)."""
    shape = layer.shape
    active = torch.full_like(tokens.xBC, math.nan)
    y = active.new_full((len(tokens), shape.nheads, shape.headdim), math.nan)
    conv = {"conv": layer.conv, "state": state, "out": active}
    ssm = {"params": layer.ssm, "state": state, "out": y, "z": tokens.z}
    x, B, C = split_active(active, shape)
    inputs = (x, tokens.dt, B, C)
    if isinstance(plan, ExtendPlan):
        kernels.causal_conv1d_extend(tokens.xBC, plan=plan, **conv)
        kernels.chunk_scan(*inputs, plan=plan, **ssm)
    elif isinstance(plan, DecodePlan):
        kernels.causal_conv1d_row(tokens.xBC, plan=plan, **conv)
        kernels.decode_row(*inputs, plan=plan, **ssm)
    else:
        kernels.causal_conv1d_verify(tokens.xBC, plan=plan, drafts=drafts, **conv)
        kernels.verify(*inputs, plan=plan, drafts=drafts, **ssm)
    return active, y.flatten(1)


def split_active(
    active: torch.Tensor, shape: Shape
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The convolution's output as x, B and C with their heads and groups."""
    sizes = [shape.d_inner, shape.ngroups * shape.dstate, shape.ngroups * shape.dstate]
    x, B, C = torch.split(active, sizes, dim=-1)
    return (
        x.unflatten(-1, (shape.nheads, shape.headdim)),
        B.unflatten(-1, (shape.ngroups, shape.dstate)),
        C.unflatten(-1, (shape.ngroups, shape.dstate)),
    )


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    """||a - b|| / ||b||."""
    a, b = a.double(), b.double()
    return float((a - b).norm() / b.norm().clamp(min=1e-30))
