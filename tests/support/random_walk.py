"""Sequences that reach their tokens by any mixture of extends, decode rows and accepted drafts.

The choices come from outside: hypothesis draws them, or a seeded generator.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence

import torch

from stateferry_kernels.draft_plans import ROOT
from stateferry_kernels.operations import Kernels
from support.ssm_case import MAX_DRAFT, Layer, Tokens, Walker, make_tokens

Choose = Callable[[int, int], int]  # a number in [low, high]

# What a walk has to meet before it has shown anything.
HAZARDS = (
    "a draft passes the grid",
    "two branches pass the grid",
    "a draft starts on the grid",
    "an accepted path passes the grid",
    "an accepted path ends on the grid",
    "an accepted path skips nodes",
    "nothing is accepted",
    "a verify follows an accept",
    "an extend starts inside an interval",
    "an extend passes points that it does not keep",
    "a decode row fills its tail",
)


def paths_of(parents: Sequence[int]) -> list[tuple[int, ...]]:
    """For each node the nodes from the root to itself, itself included."""
    paths: list[tuple[int, ...]] = []
    for node, parent in enumerate(parents):
        paths.append((*(() if parent == ROOT else paths[parent]), node))
    return paths


def random_tree(choose: Choose, grid: int, nodes: int) -> list[int]:
    """Parents of a tree that is mostly chains, no deeper than the grid."""
    parents: list[int] = []
    depths: list[int] = []
    for node in range(nodes):
        back = max(0, choose(-6, 4))
        parent = max(ROOT, node - 1 - back)
        if parent != ROOT and depths[parent] == grid:
            parent = ROOT
        parents.append(parent)
        depths.append(1 if parent == ROOT else depths[parent] + 1)
    return parents


def drafted(noise: Tokens, path: Sequence[int], true: Tokens) -> Tokens:
    """The draft's tokens: the sequence's own along the path, others elsewhere."""
    parts = [None if part is None else part.clone() for part in (noise.xBC, noise.dt, noise.z)]
    for part, own in zip(parts, (true.xBC, true.dt, true.z), strict=True):
        if part is not None and own is not None:
            part[list(path)] = own
    return Tokens(*parts)  # type: ignore[arg-type]


def poison_unused(walker: Walker) -> None:
    """NaN into every tail row that no sequence has reached, and into all drafts."""
    state, grid = walker.state, walker.layer.shape.grid
    for pool in (state.tail_xBC, state.tail_x, state.tail_B, state.tail_dt):
        for number, position in enumerate(walker.positions):
            pool[number, position % grid :] = math.nan
    drafts = walker.drafts
    for pool in (drafts.xBC, drafts.x, drafts.B, drafts.dt):
        pool.fill_(math.nan)


class Walk:
    """All sequences walk together, each to the end of its tokens."""

    def __init__(
        self, layer: Layer, kernels: Kernels, sequences: Sequence[Tokens], choose: Choose
    ) -> None:
        self.walker = Walker(layer, len(sequences), kernels)
        self.met: Counter[str] = Counter()
        self._sequences = sequences
        self._choose = choose
        self._outputs: list[list[torch.Tensor]] = [[] for _ in sequences]
        self._accepted = False

    def run(self) -> list[torch.Tensor]:
        """y (seqlen, d_inner) of each sequence."""
        while any(self._left(number) for number in range(len(self._sequences))):
            everyone = all(self._left(number) for number in range(len(self._sequences)))
            kind = self._choose(0, 3) if everyone else 0
            if kind == 0:
                self._extend()
            elif kind == 1:
                shortest = min(self._left(number) for number in range(len(self._sequences)))
                for _ in range(self._choose(1, min(shortest, 5))):
                    self._decode()
            else:
                self._speculate()
            poison_unused(self.walker)
        return [torch.cat(parts) for parts in self._outputs]

    def _left(self, number: int) -> int:
        return len(self._sequences[number]) - self.walker.positions[number]

    def _next(self, number: int, count: int) -> Tokens:
        position = self.walker.positions[number]
        return self._sequences[number][position : position + count]

    def _extend(self) -> None:
        grid = self.walker.layer.shape.grid
        takes: list[Tokens | None] = []
        for number in range(len(self._sequences)):
            # The smallest choices make the shortest walk. Somebody moves in every round.
            most = min(self._left(number), 2 * grid + 3)
            least = 0 if any(takes) else min(most, 1)
            count = most - self._choose(0, most - least)
            takes.append(self._next(number, count) if count else None)
        keep = bool(self._choose(0, 1))
        for number, new in enumerate(takes):
            if new is not None:
                start = self.walker.positions[number]
                passed = (start + len(new)) // grid - start // grid
                self.met["an extend starts inside an interval"] += start % grid != 0
                self.met["an extend passes points that it does not keep"] += passed > 1 and not keep
        outputs = iter(self.walker.extend(takes, every_boundary=keep))
        for number, new in enumerate(takes):
            if new is not None:
                self._outputs[number].append(next(outputs).xBC)
        self._accepted = False

    def _decode(self) -> None:
        y = self.walker.decode([self._next(n, 1) for n in range(len(self._sequences))])
        grid = self.walker.layer.shape.grid
        for number, row in enumerate(y):
            self._outputs[number].append(row[None])
            self.met["a decode row fills its tail"] += self.walker.positions[number] % grid == 0
        self._accepted = False

    def _speculate(self) -> None:
        drafts, kept = [], []
        for number in range(len(self._sequences)):
            nodes = self._choose(1, MAX_DRAFT)
            parents = random_tree(self._choose, self.walker.layer.shape.grid, nodes)
            chosen = self._choose(-1, nodes - 1)
            path = () if chosen == -1 else paths_of(parents)[chosen][: self._left(number)]
            seed = 77 * number + self.walker.positions[number]
            noise = make_tokens(self.walker.layer, nodes, seed=seed, with_z=True)
            drafts.append((drafted(noise, path, self._next(number, len(path))), parents))
            kept.append(path)
            self._note(number, parents, path)
        outputs = self.walker.verify(drafts)
        self.walker.accept(kept)
        for number, (y, path) in enumerate(zip(outputs, kept, strict=True)):
            self._outputs[number].append(y[list(path)])
        self._accepted = any(kept)

    def _note(self, number: int, parents: Sequence[int], path: tuple[int, ...]) -> None:
        grid, position = self.walker.layer.shape.grid, self.walker.positions[number]
        room = grid - position % grid
        folds = {full[:room] for full in paths_of(parents) if len(full) > room}
        self.met["a draft passes the grid"] += bool(folds)
        self.met["two branches pass the grid"] += len(folds) > 1
        self.met["a draft starts on the grid"] += position % grid == 0
        self.met["an accepted path passes the grid"] += len(path) > room
        self.met["an accepted path ends on the grid"] += len(path) == room
        self.met["an accepted path skips nodes"] += path != tuple(range(len(path)))
        self.met["nothing is accepted"] += not path
        self.met["a verify follows an accept"] += self._accepted
