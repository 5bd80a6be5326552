"""What hangs in the cache's tree: points with a state and, below them, tails."""

from __future__ import annotations

import enum
from bisect import bisect_left, insort
from operator import attrgetter

from stateferry.cache.handles import StateHandle
from stateferry.prefix.prefix_hash import TOKEN_BYTES
from stateferry.prefix.radix_tree import Node, RadixTree

# KV pages of one unit: one grid interval's, in order. Nodes of a model without attention have none.
Pages = tuple[int, ...]


class Origin(enum.Enum):
    """Why a snapshot was taken. How often those of one kind are used again depends on the traffic,
    and is learned."""

    PROMPT = "the end of a prompt"
    TURN = "the end of a sequence"
    BRANCH = "where prompts part"
    HINT = "somebody expects to come back"
    # Nobody is known to need them.
    INTERVAL = "on the way through a prompt"
    TRACKED = "on the way through an output"


class Point:
    """A grid point that a sequence can be continued from: the state there, and the tails that begin
    there. The root's, at 0, has the zero state, which no slot is spent on.

    ``final`` is what the sampler needs to choose the token after exactly this prefix, or None.
    """

    __slots__ = (
        "alive",
        "final",
        "hits",
        "last_used",
        "locks",
        "node",
        "origin",
        "pinned",
        "state",
        "tails",
    )

    def __init__(
        self, node: CacheNode, state: StateHandle | None, origin: Origin = Origin.PROMPT
    ) -> None:
        self.node = node
        self.state = state
        self.origin = origin
        self.final: object | None = None
        # Sorted by their tokens.
        self.tails: list[Tail] = []
        self.locks = 0
        self.last_used = 0
        self.hits = 0
        # By how many sessions.
        self.pinned = 0
        self.alive = True

    @property
    def position(self) -> int:
        """In tokens."""
        return self.state.position if self.state is not None else 0


class Tail:
    """The inputs of ``tokens``, from a point on, in a tail page, and their keys and values in
    ``kv_pages``, the last one filled in part. Every place inside it can be continued from.

    ``finals`` is as a point's ``final``, by number of rows.
    """

    __slots__ = (
        "alive",
        "finals",
        "hits",
        "kv_pages",
        "last_used",
        "locks",
        "origin",
        "page",
        "pinned",
        "point",
        "stamp",
        "tokens",
    )

    def __init__(
        self,
        point: Point,
        tokens: bytes,
        page: int,
        kv_pages: Pages,
        stamp: int | None,
        origin: Origin = Origin.PROMPT,
    ) -> None:
        self.point = point
        self.origin = origin
        self.tokens = tokens
        self.page = page
        self.kv_pages = kv_pages
        self.stamp = stamp
        self.finals: dict[int, object] = {}
        self.locks = 0
        self.last_used = 0
        self.hits = 0
        # By how many sessions.
        self.pinned = 0
        self.alive = True

    @property
    def rows(self) -> int:
        return len(self.tokens) // TOKEN_BYTES


Snapshot = Point | Tail
CacheNode = Node[Pages, Point]
CacheTree = RadixTree[Pages, Point]

tokens_of = attrgetter("tokens")


def common_tokens(one: bytes, other: bytes) -> int:
    """Tokens that two encoded prefixes share."""
    low, high = 0, min(len(one), len(other)) // TOKEN_BYTES
    if one[: high * TOKEN_BYTES] == other[: high * TOKEN_BYTES]:
        return high
    while low < high:
        middle = (low + high + 1) // 2
        if one[: middle * TOKEN_BYTES] == other[: middle * TOKEN_BYTES]:
            low = middle
        else:
            high = middle - 1
    return low


def longest_match(tails: list[Tail], tokens: bytes) -> tuple[Tail | None, int]:
    """The tail that shares most tokens with ``tokens``, and how many. In sorted order it is beside
    the place where ``tokens`` would be."""
    place = bisect_left(tails, tokens, key=tokens_of)
    best, best_rows = None, 0
    for tail in tails[max(place - 1, 0) : place + 1]:
        rows = common_tokens(tail.tokens, tokens)
        if rows > best_rows:
            best, best_rows = tail, rows
    return best, best_rows


def tails_covering(tails: list[Tail], tokens: bytes) -> list[Tail]:
    """All tails that begin with ``tokens``."""
    covering = []
    for place in range(bisect_left(tails, tokens, key=tokens_of), len(tails)):
        if not tails[place].tokens.startswith(tokens):
            break
        covering.append(tails[place])
    return covering


def tails_within(tails: list[Tail], tokens: bytes) -> list[Tail]:
    """All tails that ``tokens`` begins with, shorter ones all."""
    within = []
    probe = tokens
    while probe:
        place = bisect_left(tails, probe, key=tokens_of)
        if len(probe) < len(tokens) and place < len(tails) and tails[place].tokens == probe:
            within.append(tails[place])
        if not place:
            break
        # Whatever else is within is so of the neighbour on the left as well.
        shared = common_tokens(tails[place - 1].tokens, probe)
        probe = probe[: shared * TOKEN_BYTES]
    return within


def add_sorted(tails: list[Tail], tail: Tail) -> None:
    insort(tails, tail, key=tokens_of)


def remove_sorted(tails: list[Tail], tail: Tail) -> None:
    del tails[bisect_left(tails, tail.tokens, key=tokens_of)]
