"""What a drafter proposes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

ROOT = -1


@dataclass(frozen=True, slots=True)
class DraftTree:
    """Guessed tokens. Token ``j`` follows the one at ``parents[j]``, or the sequence's last token
    where that is ROOT; parents come before children, and no two children of one are equal."""

    token_ids: tuple[int, ...] = ()
    parents: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def is_chain(self) -> bool:
        return self.parents == tuple(range(-1, len(self.parents) - 1))

    @property
    def depth(self) -> int:
        """Tokens of the longest path."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(1 if parent == ROOT else depths[parent] + 1)
        return max(depths, default=0)

    def first(self, count: int) -> DraftTree:
        """The tree of the first ``count`` tokens."""
        return DraftTree(self.token_ids[:count], self.parents[:count])


NO_DRAFT = DraftTree()


def chain(token_ids: Iterable[int]) -> DraftTree:
    """One token after the other."""
    ids = tuple(token_ids)
    return DraftTree(ids, tuple(range(-1, len(ids) - 1)))


def merged(chains: Sequence[Sequence[int]], most: int) -> DraftTree:
    """The tree of several continuations, of which earlier ones are taken first; at most ``most``
    tokens."""
    token_ids: list[int] = []
    parents: list[int] = []
    known: dict[tuple[int, int], int] = {}
    for one in chains:
        node = ROOT
        for token_id in one:
            child = known.get((node, token_id))
            if child is None:
                if len(token_ids) == most:
                    break
                child = known[node, token_id] = len(token_ids)
                token_ids.append(token_id)
                parents.append(node)
            node = child
    return DraftTree(tuple(token_ids), tuple(parents))
