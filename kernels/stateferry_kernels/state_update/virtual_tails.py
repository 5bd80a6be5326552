"""The inputs that each draft token follows: its sequence's tail, then its ancestors in the draft.

Gathered as if every draft token had a tail page of its own, so that one expression evaluates decode
rows and verify rows. Built once per plan and shared by all layers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from stateferry_kernels.draft_plans import VerifyPlan, VerifySequence


@dataclass(frozen=True, slots=True)
class PathIndex:
    """Paths of input rows, (num_paths, grid) int64 unless said otherwise. A path's entry ``k`` is
    row ``row[k]`` of ``page``, of the tails or, where ``from_draft``, of the drafts."""

    page: torch.Tensor
    row: torch.Tensor
    from_draft: torch.Tensor  # bool
    length: torch.Tensor  # (num_paths,): entries that count, the last one being the newest

    def gather(self, tails: torch.Tensor, drafts: torch.Tensor) -> torch.Tensor:
        """Rows (num_paths, grid, ..) of one pool of tails and its drafts; what lies beyond a path's
        length is unspecified."""
        none = torch.zeros_like(self.page)
        page_of = [torch.where(chosen, self.page, none) for chosen in self._sides()]
        row_of = [torch.where(chosen, self.row, none) for chosen in self._sides()]
        old, new = tails[page_of[0], row_of[0]], drafts[page_of[1], row_of[1]]
        mask = self.from_draft.view(*self.from_draft.shape, *[1] * (old.ndim - 2))
        return torch.where(mask, new, old)

    def _sides(self) -> tuple[torch.Tensor, torch.Tensor]:
        return ~self.from_draft, self.from_draft


@dataclass(frozen=True, slots=True)
class VerifyIndex:
    """Where the rows of a verify lie and what each is evaluated on.

    A row whose path passes the grid starts from a state that is folded first: ``folds`` lists those
    states once each, and ``fold_of`` says which rows use which.
    """

    draft_page: torch.Tensor  # (num_rows,)
    draft_row: torch.Tensor  # (num_rows,)
    state_slot: torch.Tensor  # (num_rows,)
    rows: PathIndex
    folds: PathIndex  # full intervals
    fold_slot: torch.Tensor  # (num_folds,): the state each fold starts from
    crossing: torch.Tensor  # (num_crossing,): rows that start from a fold
    fold_of: torch.Tensor  # (num_crossing,)


def verify_index(plan: VerifyPlan, device: torch.device) -> VerifyIndex:
    """The plan's index, built once and kept in ``plan.cache``."""
    key = f"verify_index:{device}"
    if key not in plan.cache:
        plan.cache[key] = _build(plan, device)
    index: VerifyIndex = plan.cache[key]
    return index


_Entry = tuple[int, int, bool]  # page, row, from the draft


def _build(plan: VerifyPlan, device: torch.device) -> VerifyIndex:
    grid = plan.grid
    places: list[tuple[int, int, int]] = []
    rows: list[list[_Entry]] = []
    folds: dict[tuple[int, tuple[int, ...]], int] = {}
    fold_paths: list[list[_Entry]] = []
    fold_slots: list[int] = []
    crossing: list[tuple[int, int]] = []
    for number, sequence in enumerate(plan.sequences):
        for node, path in enumerate(sequence.paths()):
            places.append((sequence.draft_page, node, sequence.state_slot))
            to_grid = grid - sequence.tail_rows
            if len(path) <= to_grid:
                rows.append([*_tail_entries(sequence), *_draft_entries(sequence, path)])
                continue
            folded = (number, path[:to_grid])
            if folded not in folds:
                folds[folded] = len(fold_paths)
                fold_paths.append(
                    [*_tail_entries(sequence), *_draft_entries(sequence, path[:to_grid])]
                )
                fold_slots.append(sequence.state_slot)
            crossing.append((len(rows), folds[folded]))
            rows.append([*_draft_entries(sequence, path[to_grid:])])
    pages, draft_rows, slots = _long(places, device).view(-1, 3).unbind(1)
    crossing_rows, fold_of = _long(crossing, device).view(-1, 2).unbind(1)
    return VerifyIndex(
        draft_page=pages,
        draft_row=draft_rows,
        state_slot=slots,
        rows=_paths(rows, grid, device),
        folds=_paths(fold_paths, grid, device),
        fold_slot=_long(fold_slots, device),
        crossing=crossing_rows,
        fold_of=fold_of,
    )


def _tail_entries(sequence: VerifySequence) -> Iterable[_Entry]:
    return ((sequence.tail_page, row, False) for row in range(sequence.tail_rows))


def _draft_entries(sequence: VerifySequence, path: tuple[int, ...]) -> Iterable[_Entry]:
    return ((sequence.draft_page, node, True) for node in path)


def _paths(paths: list[list[_Entry]], grid: int, device: torch.device) -> PathIndex:
    # Padding repeats a path's first entry, which was written: any entry would do.
    padded = [path + path[:1] * (grid - len(path)) for path in paths]
    table = _long(padded, device).view(len(paths), grid, 3)
    return PathIndex(
        page=table[..., 0],
        row=table[..., 1],
        from_draft=table[..., 2].bool(),
        length=_long([len(path) for path in paths], device),
    )


def _long(values: object, device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64, device=device)
