"""The Triton convolution against its definition in fp64, and extend, row and verify against each
other to the byte: interpreted here, on the GPU where there is one."""

from __future__ import annotations

import math
import os
from dataclasses import fields

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

pytest.importorskip("triton")

from stateferry_kernels.conv1d import torch_ops, triton_ops  # noqa: E402
from stateferry_kernels.conv1d.reference import causal_conv1d_reference  # noqa: E402
from stateferry_kernels.conv1d.triton_tables import extend_tables  # noqa: E402
from stateferry_kernels.draft_plans import ROOT, VerifyPlan, VerifySequence  # noqa: E402
from stateferry_kernels.layer_state import (  # noqa: E402
    PAD_SLOT,
    ZERO_SLOT,
    ConvParams,
    DraftRows,
    LayerState,
)
from stateferry_kernels.plans import (  # noqa: E402
    BoundaryWrite,
    DecodePlan,
    ExtendPlan,
    ExtendSequence,
)
from support.ssm_case import Layer, Shape, make_layer, poisoned_state, relative_error  # noqa: E402

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
SHAPES = {
    "plain": Shape(nheads=2, headdim=8, dstate=4, ngroups=2, grid=8),
    "two taps": Shape(nheads=1, headdim=5, dstate=3, ngroups=1, d_conv=2, grid=4),
    "one tap": Shape(nheads=2, headdim=5, dstate=3, ngroups=2, d_conv=1, grid=4),
    "three taps, more channels than a block": Shape(
        nheads=2, headdim=63, dstate=9, ngroups=1, d_conv=3, grid=40
    ),
    "window as long as the grid": Shape(nheads=1, headdim=5, dstate=3, ngroups=1, d_conv=5, grid=4),
}
MAX_DRAFT = 7


class Convolved:
    """Some sequences that go through the convolution; remembers every raw column."""

    def __init__(self, layer: Layer, num_sequences: int, ops: object = triton_ops) -> None:
        self.layer, self.ops = layer, ops
        pools = poisoned_state(layer)
        self.state = LayerState(
            **{f.name: getattr(pools, f.name).to(DEVICE) for f in fields(pools) if f.init}
        )
        self.conv = ConvParams(
            weight=layer.conv.weight.to(DEVICE),
            bias=None if layer.conv.bias is None else layer.conv.bias.to(DEVICE),
        )
        dim = layer.shape.conv_dim
        self.history = [torch.zeros(0, dim, dtype=layer.dtype) for _ in range(num_sequences)]
        self.slots = [ZERO_SLOT] * num_sequences
        self.boundaries: dict[tuple[int, int], int] = {}
        self._generator = torch.Generator().manual_seed(0)

    def columns(self, num_rows: int) -> torch.Tensor:
        dim = self.layer.shape.conv_dim
        return torch.randn(num_rows, dim, generator=self._generator).to(self.layer.dtype)

    def extend(self, pieces: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        """Columns per sequence -> outputs per sequence; a slot for every boundary."""
        grid, sequences = self.layer.shape.grid, []
        for number, piece in pieces.items():
            start = len(self.history[number])
            points = range(start // grid * grid + grid, start + len(piece) + 1, grid)
            fresh = 1 + len(self.boundaries)
            writes = tuple(BoundaryWrite(p, fresh + i) for i, p in enumerate(points))
            sequences.append(ExtendSequence(start, len(piece), self.slots[number], number, writes))
            self.boundaries |= {(number, w.position): w.state_slot for w in writes}
        plan = ExtendPlan(grid, tuple(sequences))
        out = self._call("causal_conv1d_extend", torch.cat(list(pieces.values())), plan=plan)
        for sequence in sequences:
            if sequence.boundaries:
                self.slots[sequence.tail_page] = sequence.boundaries[-1].state_slot
        return self._append(pieces, out)

    def decode(self, pieces: dict[int, torch.Tensor | None]) -> dict[int, torch.Tensor]:
        """One column per sequence, None for a row of padding that carries NaN."""
        grid, plan = self.layer.shape.grid, []
        rows = []
        for number, piece in pieces.items():
            if piece is None:
                plan.append((PAD_SLOT, 0, 0))
                rows.append(torch.full_like(self.columns(1), math.nan))
            else:
                plan.append((self.slots[number], number, len(self.history[number]) % grid))
                rows.append(piece)
        decode_plan = DecodePlan(grid, *zip(*plan, strict=True))
        out = self._call("causal_conv1d_row", torch.cat(rows), plan=decode_plan)
        padding = [i for i, piece in enumerate(pieces.values()) if piece is None]
        assert out[padding].isnan().all()
        live = [i for i in range(len(rows)) if i not in padding]
        return self._append({n: p for n, p in pieces.items() if p is not None}, out[live])

    def verify(
        self, drafts: dict[int, tuple[tuple[int, ...], torch.Tensor]]
    ) -> tuple[dict[int, torch.Tensor], DraftRows]:
        """Parents and columns per sequence -> outputs per sequence and the draft pages."""
        shape, grid = self.layer.shape, self.layer.shape.grid
        sequences = tuple(
            VerifySequence(
                self.slots[number], number, len(self.history[number]) % grid, 9 - number, parents
            )
            for number, (parents, _) in drafts.items()
        )

        def pages(*size: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.full((10, 2, MAX_DRAFT, *size), math.nan, dtype=dtype, device=DEVICE)[:, 1]

        rows = DraftRows(
            xBC=pages(shape.conv_dim, dtype=self.layer.dtype),
            x=pages(shape.nheads, shape.headdim, dtype=self.layer.dtype),
            B=pages(shape.ngroups, shape.dstate, dtype=self.layer.dtype),
            dt=pages(shape.nheads, dtype=torch.float32),
        )
        columns = torch.cat([columns for _, columns in drafts.values()])
        before = [self.state.conv_state.clone(), self.state.tail_xBC.clone()]
        out = self._call(
            "causal_conv1d_verify", columns, plan=VerifyPlan(grid, sequences), drafts=rows
        )
        same(self.state.conv_state, before[0])
        same(self.state.tail_xBC, before[1])
        parts = out.split([len(columns) for _, columns in drafts.values()])
        return dict(zip(drafts, parts, strict=True)), rows

    def check(self) -> None:
        """Every snapshot and tail is the raw columns, to the byte; nothing else was written."""
        shape = self.layer.shape
        grid, window = shape.grid, shape.d_conv - 1
        conv_state = torch.full_like(self.state.conv_state.cpu(), math.nan)
        conv_state[ZERO_SLOT] = 0
        zeros = torch.zeros(window, shape.conv_dim, dtype=self.layer.dtype)
        for (number, position), slot in self.boundaries.items():
            padded = torch.cat([zeros, self.history[number]])
            conv_state[slot] = padded[position : position + window].mT
        same(self.state.conv_state.cpu(), conv_state)
        for number, history in enumerate(self.history):
            rows = len(history) % grid
            tail = self.state.tail_xBC[number, :rows].cpu()
            same(tail, history[len(history) - rows :])

    def expected(self, columns: torch.Tensor) -> torch.Tensor:
        """The definition over all columns of a sequence, fp64."""
        bias = None if self.conv.bias is None else self.layer.conv.bias.double()
        return causal_conv1d_reference(columns.double(), self.layer.conv.weight.double(), bias)

    def _call(self, name: str, columns: torch.Tensor, **more: object) -> torch.Tensor:
        # Columns and outputs are parts of wider rows, as those of a projection are.
        wide = torch.full((len(columns), 2 * columns.shape[1]), math.nan, dtype=columns.dtype)
        wide[:, : columns.shape[1]] = columns
        xBC = wide.to(DEVICE)[:, : columns.shape[1]]
        spread = torch.full_like(wide, math.nan, device=DEVICE)
        out = spread[:, : columns.shape[1]]
        getattr(self.ops, name)(xBC, conv=self.conv, state=self.state, out=out, **more)
        assert spread[:, columns.shape[1] :].isnan().all()
        return out.cpu()

    def _append(
        self, pieces: dict[int, torch.Tensor], out: torch.Tensor
    ) -> dict[int, torch.Tensor]:
        for number, piece in pieces.items():
            self.history[number] = torch.cat([self.history[number], piece])
        parts = out.split([len(piece) for piece in pieces.values()])
        return dict(zip(pieces, parts, strict=True))


def same(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def layer_of(name: str, dtype: torch.dtype, with_bias: bool = True) -> Layer:
    return make_layer(SHAPES[name], dtype=dtype, with_conv_bias=with_bias)


# Lengths of three sequences' extends, in units of the grid and tokens. The second one reaches a
# boundary one token after it began; the third leaves a tail over old rows that it still reads.
ROUNDS = [
    {0: (0, 1), 1: (1, -1), 2: (3, 3)},
    {1: (0, 1), 0: (1, 0), 2: (1, -1)},
    {0: (1, 1), 2: (1, 0)},
    {0: (0, 1), 1: (2, 0), 2: (0, 1)},
]


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_extends(name: str, dtype: torch.dtype) -> None:
    layer = layer_of(name, dtype, with_bias=name != "two taps")
    convolved = Convolved(layer, 3)
    outputs: list[list[torch.Tensor]] = [[], [], []]
    for lengths in ROUNDS:
        grid = layer.shape.grid
        pieces = {n: convolved.columns(a * grid + b) for n, (a, b) in lengths.items()}
        for number, out in convolved.extend(pieces).items():
            outputs[number].append(out)
        convolved.check()
    for number, history in enumerate(convolved.history):
        out = torch.cat(outputs[number])
        assert relative_error(out, convolved.expected(history)) < TOLERANCE[dtype]


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_rows_are_the_rows_of_an_extend_to_the_byte(name: str, dtype: torch.dtype) -> None:
    """From the zero state, from a boundary's state, and with padding in the batch."""
    layer = layer_of(name, dtype)
    grid = layer.shape.grid
    once, by_row = Convolved(layer, 2), Convolved(layer, 2)
    first = {0: once.columns(1), 1: once.columns(grid)}
    by_row.extend(first)
    once.extend(first)
    steps = min(grid - 1, 6)
    rest = {0: once.columns(steps), 1: once.columns(steps)}
    whole = once.extend(rest)
    for t in range(steps):
        rows = by_row.decode({1: rest[1][t : t + 1], 5: None, 0: rest[0][t : t + 1]})
        for number in (0, 1):
            same(rows[number][0], whole[number][t])
        by_row.check()


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_drafts_are_the_rows_of_an_extend_to_the_byte(name: str, dtype: torch.dtype) -> None:
    layer = layer_of(name, dtype)
    grid = layer.shape.grid
    convolved = Convolved(layer, 3)
    convolved.extend({0: convolved.columns(grid + 1), 1: convolved.columns(grid - 1)})
    chain = (ROOT, 0, 1, 2)
    trees = {2: chain[:2], 0: (ROOT, 0, 0, ROOT, 1, 4, 3), 1: chain}
    drafts = {n: (parents, convolved.columns(len(parents))) for n, parents in trees.items()}
    outputs, rows = convolved.verify(drafts)
    for number, (parents, columns) in drafts.items():
        same(rows.xBC[9 - number, : len(columns)].cpu(), columns)
        assert rows.xBC[9 - number, len(columns) :].isnan().all()
        for node in range(len(parents)):
            path = [node]
            while parents[path[0]] != ROOT:
                path.insert(0, parents[path[0]])
            alone = Convolved(layer, 1)
            prefix = convolved.history[number]
            out = alone.extend({0: torch.cat([prefix, columns[path]])})[0]
            same(outputs[number][node], out[-1])
    for field in ("x", "B", "dt"):
        assert getattr(rows, field).isnan().all()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_packing_and_cuts_change_no_byte(dtype: torch.dtype) -> None:
    layer = layer_of("plain", dtype)
    together = Convolved(layer, 3)
    pieces = {n: together.columns(length) for n, length in enumerate((21, 3, 40))}
    packed = together.extend(pieces)
    for number, columns in pieces.items():
        for cut in (len(columns), 2, 8, 13):
            alone = Convolved(layer, 1)
            parts = [part for part in (columns[:cut], columns[cut:]) if len(part)]
            out = torch.cat([alone.extend({0: part})[0] for part in parts])
            same(out, packed[number])
            for (_, position), slot in alone.boundaries.items():
                other = together.boundaries[number, position]
                same(alone.state.conv_state[slot], together.state.conv_state[other])


def test_old_rows_are_read_before_they_are_overwritten() -> None:
    """On a GPU nothing orders the programs of one launch: such tails go into a second one."""

    def later(start: int, length: int) -> torch.Tensor | None:
        end = start + length
        writes = tuple(BoundaryWrite(p, p) for p in range(8, end + 1, 8) if p > start)
        plan = ExtendPlan(8, (ExtendSequence(start, length, 0, 0, writes),))
        return extend_tables(plan, 3, torch.device(DEVICE)).later

    # Rows 4 to 6 of the tail are read.
    for length, overwrites in (
        (1, False),
        (5, False),
        (6, True),
        (8, True),
        (9, False),
        (14, True),
    ):
        assert (later(7, length) is not None) == overwrites
    # Nothing old; all of it before a boundary; no boundary at all.
    for start, length in ((0, 30), (8, 30), (2, 6), (2, 4)):
        assert later(start, length) is None


def test_like_the_torch_operations() -> None:
    layer = layer_of("plain", torch.float32)
    both = [Convolved(layer, 2, ops) for ops in (triton_ops, torch_ops)]
    pieces = {0: both[0].columns(13), 1: both[0].columns(5)}
    ours, theirs = (convolved.extend(pieces) for convolved in both)
    for number in pieces:
        assert relative_error(ours[number], theirs[number]) < 1e-6


def test_nothing_to_do() -> None:
    layer = layer_of("plain", torch.float32)
    convolved = Convolved(layer, 1)
    empty = torch.empty(0, layer.shape.conv_dim, device=DEVICE)
    common = {"conv": convolved.conv, "state": convolved.state, "out": empty}
    triton_ops.causal_conv1d_extend(empty, plan=ExtendPlan(8, ()), **common)
    triton_ops.causal_conv1d_row(empty, plan=DecodePlan(8, (), (), ()), **common)
    convolved.check()


def test_refuses() -> None:
    layer = layer_of("plain", torch.float32)
    convolved = Convolved(layer, 1)
    plan = DecodePlan(8, (ZERO_SLOT,), (0,), (0,))
    columns = convolved.columns(1).to(DEVICE)
    common = {"conv": convolved.conv, "state": convolved.state, "plan": plan}
    with pytest.raises(ValueError, match="xBC"):
        triton_ops.causal_conv1d_row(columns[:, :-1], out=columns, **common)
    with pytest.raises(TypeError, match="out"):
        triton_ops.causal_conv1d_row(columns, out=columns.double(), **common)
    spread = torch.empty(1, 2 * layer.shape.conv_dim, device=DEVICE)[:, ::2]
    with pytest.raises(ValueError, match="out"):
        triton_ops.causal_conv1d_row(columns, out=spread, **common)
