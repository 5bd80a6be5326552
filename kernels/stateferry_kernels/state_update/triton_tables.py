"""The walks of decode rows, commits and drafts, built from the plans' integers, once for all layers
of a step."""

from __future__ import annotations

from typing import NamedTuple

import torch

from stateferry_kernels.device_tables import device_table
from stateferry_kernels.draft_plans import AcceptPlan, VerifyPlan, VerifySequence
from stateferry_kernels.layer_state import PAD_SLOT
from stateferry_kernels.plans import CommitPlan, DecodePlan
from stateferry_kernels.ssd.triton_walk import CARRY_ON, Interval, Walks, walk_tables


class RowTables(NamedTuple):
    """Walks that leave rows in pages: ``left`` (num_rows, 4) int64 as in leave_rows."""

    walks: Walks
    left: torch.Tensor


class DraftTables(NamedTuple):
    """Walks along the paths of drafts, for triton_verify_kernels.py; int64."""

    walks: Walks
    # (num_intervals, 4): draft page, the row of the batch that is row 0 there, the fold that the
    # interval begins with, the fold that is its end; -1 for none
    places: torch.Tensor
    ends: torch.Tensor  # (num_folds, 2): interval, the slot of the state that it begins with
    carries: bool  # whether some interval goes on with the state of the one before it


class CommitTables(NamedTuple):
    walks: Walks
    windows: torch.Tensor  # (num_commits, 4) int64: source slot, target slot, page, rows


class AcceptTables(NamedTuple):
    """Rows to move, (num_rows, 4) int64, before and after the commit that some make due."""

    before: torch.Tensor
    commit: CommitPlan
    after: torch.Tensor


def decode_rows(plan: DecodePlan, device: torch.device) -> torch.Tensor:
    """(num_rows, 4) int64 of the rows that are not padding: row in the batch, state slot, tail
    page, tail row."""
    key = f"decode_rows_triton:{device}"
    if key not in plan.cache:
        columns = zip(plan.state_slots, plan.tail_pages, plan.tail_rows, strict=True)
        rows = [(i, *row) for i, row in enumerate(columns) if row[0] != PAD_SLOT]
        plan.cache[key] = device_table(rows, 4, device)
    table: torch.Tensor = plan.cache[key]
    return table


def decode_tables(plan: DecodePlan, device: torch.device) -> RowTables:
    key = f"decode_triton:{device}"
    if key not in plan.cache:
        walks: list[list[Interval]] = []
        left: list[tuple[int, int, int, int]] = []
        columns = zip(plan.state_slots, plan.tail_pages, plan.tail_rows, strict=True)
        for i, (slot, page, row) in enumerate(columns):
            if slot != PAD_SLOT:
                left.append((i, len(walks) * plan.grid + row, page, row))
                walks.append([Interval(slot, page, row, i, row + 1, row)])
        plan.cache[key] = RowTables(walk_tables(walks, None, device), device_table(left, 4, device))
    tables: RowTables = plan.cache[key]
    return tables


def commit_tables(plan: CommitPlan, device: torch.device) -> CommitTables:
    key = f"commit_triton:{device}"
    if key not in plan.cache:
        columns = zip(plan.src_slots, plan.dst_slots, plan.tail_pages, plan.tail_rows, strict=True)
        rows = list(columns)
        walks = [
            [Interval(src, page, count, 0, count, count, boundary_slot=dst, folds=True)]
            for src, dst, page, count in rows
        ]
        plan.cache[key] = CommitTables(
            walk_tables(walks, None, device), device_table(rows, 4, device)
        )
    tables: CommitTables = plan.cache[key]
    return tables


def verify_tables(plan: VerifyPlan, device: torch.device) -> RowTables:
    key = f"verify_triton:{device}"
    if key not in plan.cache:
        walks, paths, places = _draft_walks(plan)
        left: list[tuple[int, int, int, int]] = []
        num_intervals, first_row = 0, 0
        for sequence, walk, of_node in zip(plan.sequences, walks, places, strict=True):
            for node, (interval, entry) in enumerate(of_node):
                place = (num_intervals + interval) * plan.grid + entry
                left.append((first_row + node, place, sequence.draft_page, node))
            num_intervals += len(walk)
            first_row += len(sequence.parents)
        plan.cache[key] = RowTables(
            walk_tables(walks, paths, device), device_table(left, 4, device)
        )
    tables: RowTables = plan.cache[key]
    return tables


def draft_tables(plan: VerifyPlan, device: torch.device) -> DraftTables:
    key = f"draft_triton:{device}"
    if key not in plan.cache:
        walks, paths, _ = _draft_walks(plan)
        places: list[tuple[int, int, int, int]] = []
        ends: list[tuple[int, int]] = []
        first_row, carries = 0, False
        for sequence, walk in zip(plan.sequences, walks, strict=True):
            begins_with = -1
            for interval in walk:
                if interval.state_slot != CARRY_ON:
                    begins_with = -1
                fold = -1
                if interval.folds:
                    fold = len(ends)
                    ends.append((len(places), sequence.state_slot))
                carries |= interval.state_slot == CARRY_ON and begins_with < 0
                places.append((sequence.draft_page, first_row, begins_with, fold))
                if interval.folds:
                    begins_with = fold
            first_row += len(sequence.parents)
        plan.cache[key] = DraftTables(
            walk_tables(walks, paths, device),
            device_table(places, 4, device),
            device_table(ends, 2, device),
            carries,
        )
    tables: DraftTables = plan.cache[key]
    return tables


def _draft_walks(
    plan: VerifyPlan,
) -> tuple[list[list[Interval]], list[int], list[list[tuple[int, int]]]]:
    """Each sequence's walk, the rows of the batch along all paths, and each sequence's nodes'
    (interval, entry)."""
    walks: list[list[Interval]] = []
    paths: list[int] = []
    places: list[list[tuple[int, int]]] = []
    first_row = 0
    for sequence in plan.sequences:
        walk, of_node = _draft_walk(sequence, first_row, plan.grid, paths)
        walks.append(walk)
        places.append(of_node)
        first_row += len(sequence.parents)
    return walks, paths, places


def accept_tables(plan: AcceptPlan, device: torch.device) -> AcceptTables:
    key = f"accept_triton:{device}"
    if key not in plan.cache:
        before: list[tuple[int, int, int, int]] = []
        after: list[tuple[int, int, int, int]] = []
        full = [sequence for sequence in plan.sequences if sequence.boundary_slot != PAD_SLOT]
        for sequence in plan.sequences:
            for depth, node in enumerate(sequence.path):
                row = sequence.tail_rows + depth
                moves = before if row < plan.grid else after
                place = (sequence.draft_page, node, sequence.tail_page, row % plan.grid)
                moves.append(place)
        commit = CommitPlan(
            plan.grid,
            tuple(sequence.state_slot for sequence in full),
            tuple(sequence.boundary_slot for sequence in full),
            tuple(sequence.tail_page for sequence in full),
        )
        plan.cache[key] = AcceptTables(
            device_table(before, 4, device), commit, device_table(after, 4, device)
        )
    tables: AcceptTables = plan.cache[key]
    return tables


def _draft_walk(
    sequence: VerifySequence, first_row: int, grid: int, paths: list[int]
) -> tuple[list[Interval], list[tuple[int, int]]]:
    """One walk through all paths of a draft, and each node's (interval, entry) in it.

    A path of the tree is an interval, two where it passes the grid. Nodes that paths share are
    evaluated once, with the first. Paths that stay before the grid leave the state as it is, so
    they come first; those after a full interval carry on from its end.
    """
    tail_rows, to_grid = sequence.tail_rows, grid - sequence.tail_rows
    node_paths = sequence.paths()
    near = _leaves([path for path in node_paths if len(path) <= to_grid])
    far: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for path in node_paths:
        if len(path) > to_grid:
            far.setdefault(path[:to_grid], []).append(path[to_grid:])
    walk: list[Interval] = []
    places: dict[int, tuple[int, int]] = {}

    def append(path: tuple[int, ...], old_rows: int, slot: int, *, folds: bool = False) -> None:
        fresh = next((i for i, node in enumerate(path) if node not in places), len(path))
        for i in range(fresh, len(path)):
            places[path[i]] = (len(walk), old_rows + i)
        count = old_rows + len(path)
        walk.append(
            Interval(
                state_slot=slot,
                tail_page=sequence.tail_page,
                old_rows=old_rows,
                first=len(paths),
                count=count,
                first_row=old_rows + fresh,
                folds=folds,
            )
        )
        paths.extend(first_row + node for node in path)

    for path in (path for path in near if path not in far):
        append(path, tail_rows, CARRY_ON if walk else sequence.state_slot)
    for path, ends in far.items():
        moved_on = any(interval.folds for interval in walk)
        slot = CARRY_ON if walk and not moved_on else sequence.state_slot
        append(path, tail_rows, slot, folds=True)
        for end in _leaves(ends):
            append(end, 0, CARRY_ON)
    return walk, [places[node] for node in range(len(sequence.parents))]


def _leaves(paths: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Those of the paths that are no other's beginning."""
    inner = {path[:-1] for path in paths}
    return [path for path in paths if path not in inner]
