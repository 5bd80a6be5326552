# mypy: allow-untyped-calls
"""Plans of launches that are captured once and replayed: their tables stay where they are, and each
step fills them anew. For the Triton backend alone, whose kernels skip rows that are padding.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from stateferry_kernels.attention.triton_tables import KvTables
from stateferry_kernels.guards import check_commit_plan, check_decode_plan, check_kv_plan
from stateferry_kernels.kv_layer import KvLayer, KvPlan, KvSequence
from stateferry_kernels.layer_state import PAD_SLOT, ZERO_SLOT, LayerState
from stateferry_kernels.plans import CommitPlan, DecodePlan
from stateferry_kernels.ssd.triton_walk import Interval, Walks
from stateferry_kernels.state_update.triton_tables import CommitTables, RowTables

# Elements between the beginnings of two tables: Triton compiles kernels for such addresses.
_ALIGNED = 32
_INTERVAL_FIELDS = len(Interval.__dataclass_fields__)


class _Tables:
    """Tables of int64 on the device, and the same in pinned memory, where they are written."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], device: torch.device) -> None:
        sizes = {name: int(np.prod(shape)) for name, shape in shapes.items()}
        begins, total = {}, 0
        for name, size in sizes.items():
            begins[name] = total
            total += size + -size % _ALIGNED
        self._on_host = torch.zeros(total, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._on_device = torch.zeros(total, dtype=torch.int64, device=device)
        self._sent = torch.cuda.Event() if device.type == "cuda" else None

        def part(whole: torch.Tensor, name: str) -> torch.Tensor:
            return whole[begins[name] : begins[name] + sizes[name]].view(shapes[name])

        self.device = {name: part(self._on_device, name) for name in shapes}
        self.host: dict[str, npt.NDArray[np.int64]] = {
            name: part(self._on_host, name).numpy() for name in shapes
        }

    def wait(self) -> None:
        """Before anything is written again: until the device has what was sent last."""
        if self._sent is not None:
            self._sent.synchronize()

    def send(self) -> None:
        """Queue the copy."""
        # Where tables were made in this mode, they may be written in no other.
        with torch.inference_mode():
            self._on_device.copy_(self._on_host, non_blocking=True)
        if self._sent is not None:
            self._sent.record()


class ReplayedDecode:
    """One decode step of up to ``num_rows`` sequences, in a batch of ``batch_rows`` rows whose rest
    is padding. ``plan`` and ``kv_plan`` are for the capture; ``fill`` says what the next replay
    works on."""

    def __init__(
        self,
        state: LayerState,
        kv: KvLayer | None,
        *,
        page_tokens: int,
        num_rows: int,
        batch_rows: int,
        longest: int,
    ) -> None:
        """state: any of the model's layers; kv: likewise, None in a model without attention.
        longest: tokens that a sequence has at most."""
        device, grid = state.ssm_state.device, state.grid
        self.num_rows = num_rows
        self._state, self._kv, self._longest = state, kv, longest
        self._pages_of: list[tuple[int, ...]] = [()] * num_rows
        most_pages = 0 if kv is None else -(-longest // page_tokens)
        self._page_tables = _Tables({"pages": (num_rows, max(1, most_pages))}, device)
        self._tables = _Tables(
            {
                "token_ids": (batch_rows,),
                "sources": (batch_rows,),
                "positions": (batch_rows,),
                "rows": (num_rows, 4),
                "conv": (num_rows, 3),
                "walks": (num_rows, 2),
                "intervals": (num_rows, _INTERVAL_FIELDS),
                "left": (num_rows, 4),
                "tokens": (num_rows, 2),
                "tiles": (num_rows, 3),
            },
            device,
        )
        tables = self._tables.device
        self._token_ids, self._sources = tables["token_ids"], tables["sources"]
        walks = Walks(tables["walks"], tables["intervals"], paths=None, folds=False, rows=1)
        self.plan = DecodePlan(
            grid,
            (PAD_SLOT,) * batch_rows,
            (0,) * batch_rows,
            (0,) * batch_rows,
            cache={
                f"decode_rows_triton:{device}": tables["rows"],
                f"conv1d_triton:{device}": tables["conv"],
                f"decode_triton:{device}": RowTables(walks, tables["left"]),
            },
        )
        self.kv_plan = KvPlan(
            page_tokens,
            (KvSequence(longest - 1, 1, ()),) * batch_rows,
            cache={
                f"positions:{device}": tables["positions"],
                f"kv_triton:{device}": KvTables(
                    tables["tokens"], self._page_tables.device["pages"]
                ),
                f"kv_triton_tiles:{device}:1": tables["tiles"],
            },
        )
        if kv is not None:
            self.kv_plan.cache[f"checked:{kv.keys.shape[0]}:{page_tokens}"] = True
        self._write([], [], DecodePlan(grid, (), (), ()), ())
        self._tables.send()

    def consumed(self, chosen: torch.Tensor) -> torch.Tensor:
        """(batch_rows,) int64, the step's token ids, of which those with a source are from
        ``chosen``, int64 on the device."""
        theirs = chosen[self._sources.clamp(min=0)]
        return torch.where(self._sources < 0, self._token_ids, theirs)

    def fill(
        self, token_ids: Sequence[int], sources: Sequence[int], plan: DecodePlan, kv_plan: KvPlan
    ) -> None:
        """What the next replay consumes: at most num_rows rows, none of them padding; ``sources``
        are places in ``chosen``, -1 of rows whose token id is given. Raises ValueError for a slot,
        page or position that the pools do not have."""
        if len(token_ids) > self.num_rows or PAD_SLOT in plan.state_slots:
            raise ValueError(f"{len(token_ids)} rows or padding in a step of {self.num_rows} rows")
        check_decode_plan(plan, self._state)
        sequences = kv_plan.sequences
        if max((sequence.end for sequence in sequences), default=0) > self._longest:
            raise ValueError(f"a sequence is longer than {self._longest} tokens")
        if self._kv is not None:
            self._fill_pages(kv_plan)
        self._write(token_ids, sources, plan, sequences)
        self._tables.send()

    def _fill_pages(self, kv_plan: KvPlan) -> None:
        assert self._kv is not None
        table, shown, changed = self._page_tables.host["pages"], self._pages_of, False
        for i, sequence in enumerate(kv_plan.sequences):
            if sequence.end > len(sequence.pages) * kv_plan.page_tokens:
                raise ValueError(f"pages: a sequence ends at {sequence.end}, past its pages")
            # A sequence keeps its pages, so most often this is the tuple of the last step.
            if sequence.pages is not shown[i]:
                if not changed:
                    check_kv_plan(kv_plan, self._kv)
                    self._page_tables.wait()
                pages = sequence.pages[: table.shape[1]]
                table[i, : len(pages)] = pages
                shown[i], changed = sequence.pages, True
        if changed:
            self._page_tables.send()

    def _write(
        self,
        token_ids: Sequence[int],
        sources: Sequence[int],
        plan: DecodePlan,
        sequences: Sequence[KvSequence],
    ) -> None:
        self._tables.wait()
        count, host = len(token_ids), self._tables.host
        number = np.arange(count)
        slots = np.array(plan.state_slots, dtype=np.int64)
        pages = np.array(plan.tail_pages, dtype=np.int64)
        tail_rows = np.array(plan.tail_rows, dtype=np.int64)
        positions = np.array([sequence.start for sequence in sequences], dtype=np.int64)

        def put(name: str, *columns: npt.NDArray[np.int64] | int, padding: int = 0) -> None:
            table = host[name]
            table[count:] = padding
            for i, column in enumerate(columns):
                table[:count, i] = column

        host["token_ids"][:count], host["token_ids"][count:] = token_ids, 0
        host["sources"][:count], host["sources"][count:] = sources, -1
        host["positions"][:count], host["positions"][count:] = positions, 0
        put("rows", number, slots, pages, tail_rows, padding=PAD_SLOT)
        put("conv", slots, pages, tail_rows, padding=PAD_SLOT)
        put("walks", number, number + 1)
        end = tail_rows + 1
        put("intervals", slots, pages, tail_rows, number, end, tail_rows, PAD_SLOT, 0)
        put("left", number, number * plan.grid + tail_rows, pages, tail_rows, padding=-1)
        put("tokens", number, positions, padding=-1)
        put("tiles", number, 1, number, padding=-1)


class ReplayedCommit:
    """Up to ``num_rows`` commits of full tails, as ReplayedDecode."""

    def __init__(self, state: LayerState, num_rows: int) -> None:
        device, grid = state.ssm_state.device, state.grid
        self.num_rows = num_rows
        self._state = state
        self._tables = _Tables(
            {
                "walks": (num_rows, 2),
                "intervals": (num_rows, _INTERVAL_FIELDS),
                "windows": (num_rows, 4),
            },
            device,
        )
        tables = self._tables.device
        walks = Walks(tables["walks"], tables["intervals"], paths=None, folds=True, rows=0)
        # Any slots that a plan may name: what is launched reads the tables.
        self.plan = CommitPlan(
            grid,
            (ZERO_SLOT,) * num_rows,
            tuple(range(ZERO_SLOT + 1, ZERO_SLOT + 1 + num_rows)),
            (0,) * num_rows,
            cache={f"commit_triton:{device}": CommitTables(walks, tables["windows"])},
        )
        self._write(CommitPlan(grid, (), (), ()))
        self._tables.send()

    def fill(self, plan: CommitPlan) -> None:
        """What the next replay folds. Raises ValueError for a slot or page that the pools do not
        have."""
        if len(plan.src_slots) > self.num_rows:
            raise ValueError(f"{len(plan.src_slots)} commits in a step of {self.num_rows}")
        check_commit_plan(plan, self._state)
        self._write(plan)
        self._tables.send()

    def _write(self, plan: CommitPlan) -> None:
        self._tables.wait()
        count, host = len(plan.src_slots), self._tables.host
        number = np.arange(count)
        columns = (plan.src_slots, plan.dst_slots, plan.tail_pages, plan.tail_rows)
        src, dst, pages, rows = (np.array(column, dtype=np.int64) for column in columns)
        for table, padding in (("walks", 0), ("intervals", 0), ("windows", PAD_SLOT)):
            host[table][count:] = padding
        host["walks"][:count] = np.stack([number, number + 1], axis=1)
        zeros, ones = np.zeros_like(src), np.ones_like(src)
        fields = [src, pages, rows, zeros, rows, rows, dst, ones]
        host["intervals"][:count] = np.stack(fields, axis=1)
        host["windows"][:count] = np.stack([src, dst, pages, rows], axis=1)
