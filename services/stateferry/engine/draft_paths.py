"""Where the keys and values of draft trees lie until one path is accepted.

The first path of a tree goes behind the sequence's end, in its own pages, as a chain does. Each
other one has pages of the draft pool from the page on that the sequence's end is in, whose places
before it are copied; what was accepted is copied back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stateferry.cache.page_copy import PageCopy
from stateferry.core.errors import InvariantViolation
from stateferry.engine.verify_batch import Run, VerifyBatch, VerifyInput
from stateferry.models.tree_rows import TreeRows
from stateferry_kernels.kv_layer import KvPlan, KvSequence

# A path is shorter than a page, so it ends in the page where it begins or in the next one.
PAGES_PER_PATH = 2


@dataclass(frozen=True, slots=True)
class _Path:
    nodes: tuple[int, ...]
    start: int
    pages: tuple[int, ...]

    def places(self, page_tokens: int) -> list[tuple[int, int]]:
        """(page, places of it) that hold the path's first ``start`` to end, from the page on that
        it begins in."""
        end, first = self.start + len(self.nodes), self.start // page_tokens
        return [
            (self.pages[number], min(page_tokens, end - number * page_tokens))
            for number in range(first, -(-end // page_tokens))
        ]


@dataclass(frozen=True, slots=True)
class DraftPaths:
    """The paths of a batch's trees. ``before`` are the copies that the verification needs."""

    tree_rows: TreeRows
    before: tuple[PageCopy, ...]
    _paths: tuple[tuple[_Path, ...], ...]
    _page_tokens: int

    def after(self, runs: Sequence[Run]) -> list[PageCopy]:
        """The copies that make what was accepted part of the sequences."""
        copies = []
        for paths, run in zip(self._paths, runs, strict=True):
            length = len(run.path)
            taken = next(path for path in paths if path.nodes[:length] == run.path)
            if taken is paths[0]:
                continue
            own = _Path(run.path, taken.start, paths[0].pages).places(self._page_tokens)
            theirs = _Path(run.path, taken.start, taken.pages).places(self._page_tokens)
            copies += [
                PageCopy("kv", source, target, rows)
                for (source, _), (target, rows) in zip(theirs, own, strict=True)
            ]
        return copies


def draft_paths(
    batch: VerifyBatch, page_tokens: int, pages: Sequence[int], most_paths: int
) -> DraftPaths | None:
    """None where all drafts are chains. ``pages`` are for drafts, ``PAGES_PER_PATH`` for each path
    but the first of each sequence. Raises InvariantViolation for a tree of more than ``most_paths``
    paths."""
    if all(row.draft.is_chain for row in batch.rows):
        return None
    per_sequence = (most_paths - 1) * PAGES_PER_PATH
    paths, before = [], []
    for number, row in enumerate(batch.rows):
        own = pages[number * per_sequence : (number + 1) * per_sequence]
        made, copies = _paths_of(row, page_tokens, own)
        paths.append(made)
        before += copies
    return DraftPaths(
        _tree_rows(batch, paths, page_tokens), tuple(before), tuple(paths), page_tokens
    )


def _paths_of(
    row: VerifyInput, page_tokens: int, pages: Sequence[int]
) -> tuple[tuple[_Path, ...], list[PageCopy]]:
    own, start = row.lease.kv_pages, row.lease.position
    begun, rows = divmod(start, page_tokens)
    paths, copies = [], []
    for number, nodes in enumerate(_leaf_paths(row.parents)):
        where = own
        if number:
            free = pages[(number - 1) * PAGES_PER_PATH : number * PAGES_PER_PATH]
            if len(free) < PAGES_PER_PATH:
                raise InvariantViolation("a draft of more paths than there are pages for")
            where = (*own[:begun], *free)
            if rows:
                copies.append(PageCopy("kv", own[begun], free[0], rows))
        paths.append(_Path(nodes, start, where))
    return tuple(paths), copies


def _leaf_paths(parents: Sequence[int]) -> list[tuple[int, ...]]:
    """From the root to each leaf, in the order of the leaves."""
    inner = set(parents)
    found = []
    for node in range(len(parents)):
        if node not in inner:
            path = [node]
            while parents[path[-1]] >= 0:
                path.append(parents[path[-1]])
            found.append(tuple(reversed(path)))
    return found


def _tree_rows(batch: VerifyBatch, paths: Sequence[Sequence[_Path]], page_tokens: int) -> TreeRows:
    rows: list[int] = []
    sequences: list[KvSequence] = []
    positions: list[int] = []
    offset = 0
    for row, made in zip(batch.rows, paths, strict=True):
        depths = dict.fromkeys(range(row.num_rows), 0)
        for path in made:
            rows += (offset + node for node in path.nodes)
            sequences.append(KvSequence(path.start, len(path.nodes), path.pages))
            depths.update({node: depth for depth, node in enumerate(path.nodes)})
        positions += (row.lease.position + depths[node] for node in range(row.num_rows))
        offset += row.num_rows
    first: dict[int, int] = {}
    for place, node in enumerate(rows):
        first.setdefault(node, place)
    return TreeRows(
        kv_plan=KvPlan(page_tokens, tuple(sequences)),
        rows=tuple(rows),
        first=tuple(first[node] for node in range(offset)),
        positions=tuple(positions),
    )
