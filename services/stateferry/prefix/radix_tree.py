"""A radix tree over byte strings, compared unit by unit.

A unit is a fixed number of bytes: a grid interval of tokens in a worker's cache, a prefix hash in a
router's index. Each namespace has a tree of its own. A node owns the units
``[first, end)`` of every key that passes through it::

    spans    one value per unit, or none at all
    points   values at unit boundaries in (first, end]; the root's may be at 0

Nodes are split where keys part; values stay with the part that contains them, and the lower part
keeps the node's identity, so whoever holds a node holds the same end of the same path.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from stateferry.core.errors import InvariantViolation
from stateferry.prefix.prefix_hash import next_hash

S = TypeVar("S")
P = TypeVar("P")

# Longer keys make chains of nodes, so that cutting a node never copies more than this.
MAX_NODE_UNITS = 64


class Node(Generic[S, P]):
    """See the module. ``locks`` counts holders of this node or of one below it."""

    __slots__ = (
        "children",
        "first",
        "hashes",
        "key",
        "last_used",
        "locks",
        "num_units",
        "parent",
        "points",
        "spans",
    )

    def __init__(
        self, key: bytes, first: int, num_units: int, parent: Node[S, P] | None, spans: list[S]
    ) -> None:
        self.key = key
        self.first = first
        self.num_units = num_units
        self.parent = parent
        self.children: dict[bytes, Node[S, P]] = {}
        self.spans = spans
        self.points: dict[int, P] = {}
        # Chain hashes of the first units, as far as somebody has asked.
        self.hashes: list[bytes] = []
        self.locks = 0
        self.last_used = 0

    @property
    def end(self) -> int:
        return self.first + self.num_units

    @property
    def is_root(self) -> bool:
        return self.parent is None


@dataclass(frozen=True, slots=True)
class Walk(Generic[S, P]):
    """How far a key goes in the tree. ``path`` begins with the root; its last node may be matched
    in part: ``units`` is what the key shares with the path, in units from the root."""

    path: list[Node[S, P]]
    units: int

    @property
    def node(self) -> Node[S, P]:
        return self.path[-1]


class RadixTree(Generic[S, P]):
    """Trees by namespace. No method but ``walk`` looks at keys, none at values."""

    def __init__(self, unit_bytes: int) -> None:
        if unit_bytes < 1:
            raise ValueError(f"a unit of {unit_bytes} bytes")
        self.unit_bytes = unit_bytes
        self.num_nodes = 0
        self._roots: dict[bytes, Node[S, P]] = {}

    def root(self, namespace: bytes) -> Node[S, P] | None:
        """The root of a namespace that something was put in."""
        return self._roots.get(namespace)

    def plant(self, namespace: bytes) -> Node[S, P]:
        """The root of a namespace, made when it is not there."""
        root = self._roots.get(namespace)
        if root is None:
            root = self._roots[namespace] = Node(b"", 0, 0, None, [])
            # What the chain of hashes starts with.
            root.hashes = [namespace]
        return root

    def uproot(self, namespace: bytes) -> None:
        """Forget an empty namespace."""
        if self._roots[namespace].children:
            raise InvariantViolation("a namespace with nodes cannot be forgotten")
        del self._roots[namespace]

    @property
    def roots(self) -> dict[bytes, Node[S, P]]:
        return self._roots

    def walk(self, root: Node[S, P], key: bytes, max_units: int) -> Walk[S, P]:
        """Follow at most ``max_units`` whole units of ``key`` from ``root``. Mutates nothing."""
        size = self.unit_bytes
        node, path, units = root, [root], 0
        max_units = min(max_units, len(key) // size)
        while units < max_units:
            at = units * size
            child = node.children.get(key[at : at + size])
            if child is None:
                break
            path.append(child)
            if units + child.num_units <= max_units and key.startswith(child.key, at):
                units += child.num_units
                node = child
                continue
            most = min(child.num_units, max_units - units)
            units += self._common_units(child.key, key, at, most)
            break
        return Walk(path, units)

    def split(self, node: Node[S, P], at: int) -> Node[S, P]:
        """Cut a node at unit boundary ``at``, inside its span, and return the upper part, a new
        node; ``node`` itself becomes the lower one."""
        parent = node.parent
        if parent is None or not node.first < at < node.end:
            raise InvariantViolation(f"[{node.first}, {node.end}) cannot be split at {at}")
        count = at - node.first
        cut = count * self.unit_bytes
        upper: Node[S, P] = Node(node.key[:cut], node.first, count, parent, node.spans[:count])
        upper.points = {unit: point for unit, point in node.points.items() if unit <= at}
        upper.hashes, node.hashes = node.hashes[:count], node.hashes[count:]
        upper.locks, upper.last_used = node.locks, node.last_used
        parent.children[node.key[: self.unit_bytes]] = upper
        node.points = {unit: point for unit, point in node.points.items() if unit > at}
        node.key, node.spans = node.key[cut:], node.spans[count:]
        node.first, node.num_units, node.parent = at, node.num_units - count, upper
        upper.children[node.key[: self.unit_bytes]] = node
        self.num_nodes += 1
        return upper

    def node_at(self, walk: Walk[S, P], unit: int) -> Node[S, P]:
        """The node of a fresh walk's path that ends at ``unit``, at most ``walk.units``. Splits one
        where none does."""
        for node in reversed(walk.path):
            if node.end == unit:
                return node
            if node.first < unit < node.end:
                return self.split(node, unit)
        raise InvariantViolation(f"unit {unit} is not on a path of {walk.units}")

    def grow(self, parent: Node[S, P], key: bytes, spans: Sequence[S] = ()) -> Node[S, P]:
        """Hang ``key``, whole units that no child of ``parent`` begins with, below its end, and
        return the node where it ends."""
        size = self.unit_bytes
        count, rest = divmod(len(key), size)
        if rest or not count or (spans and len(spans) != count) or key[:size] in parent.children:
            raise InvariantViolation(f"{len(key)} bytes cannot grow at unit {parent.end}")
        for start in range(0, count, MAX_NODE_UNITS):
            end = min(start + MAX_NODE_UNITS, count)
            part = key[start * size : end * size]
            child: Node[S, P] = Node(part, parent.end, end - start, parent, list(spans[start:end]))
            parent.children[part[:size]] = child
            parent = child
            self.num_nodes += 1
        return parent

    def trim(self, node: Node[S, P], end: int) -> None:
        """Cut a leaf down to units below ``end``, its values with them; one with nothing left is
        removed from its parent."""
        parent = node.parent
        if parent is None or node.children or not node.first <= end <= node.end:
            raise InvariantViolation(f"[{node.first}, {node.end}) cannot be trimmed to {end}")
        if end == node.first:
            del parent.children[node.key[: self.unit_bytes]]
            self.num_nodes -= 1
            return
        count = end - node.first
        node.key = node.key[: count * self.unit_bytes]
        node.num_units = count
        del node.spans[count:], node.hashes[count:]
        for unit in [unit for unit in node.points if unit > end]:
            del node.points[unit]

    def lock(self, node: Node[S, P]) -> int:
        """Count a holder of ``node`` and of all above it. Returns how many units nobody had locked
        before."""
        at: Node[S, P] | None = node
        newly_locked = 0
        while at is not None:
            newly_locked += 0 if at.locks else at.num_units
            at.locks += 1
            at = at.parent
        return newly_locked

    def unlock(self, node: Node[S, P]) -> int:
        """The opposite of ``lock``: returns how many units nobody has locked any more."""
        at: Node[S, P] | None = node
        unlocked = 0
        while at is not None:
            if at.locks < 1:
                raise InvariantViolation("a node was unlocked more often than locked")
            at.locks -= 1
            unlocked += 0 if at.locks else at.num_units
            at = at.parent
        return unlocked

    def hash_at(self, node: Node[S, P], unit: int) -> bytes:
        """The chain hash of the path's first ``unit`` units, which must end in ``node`` or where it
        begins; the namespace itself at 0. Each unit is hashed once in its life."""
        if node.parent is not None and unit == node.first:
            node = node.parent
        unhashed = [node]
        while (above := unhashed[-1].parent) is not None and len(above.hashes) < above.num_units:
            unhashed.append(above)
        for at in reversed(unhashed):
            self._hash_units(at, unit - at.first if at is node else at.num_units)
        return node.hashes[unit - node.first - 1]

    def __iter__(self) -> Iterator[Node[S, P]]:
        """All nodes, roots too, each after its parent."""
        pending = list(self._roots.values())
        while pending:
            node = pending.pop()
            yield node
            pending.extend(node.children.values())

    def check_structure(self) -> None:
        """Raises InvariantViolation naming the first node whose place or parts are wrong."""
        count = 0
        for node in self:
            count += not node.is_root
            self._check_node(node)
        if count != self.num_nodes:
            raise InvariantViolation(f"{count} nodes, {self.num_nodes} counted")

    def _check_node(self, node: Node[S, P]) -> None:
        name = f"node [{node.first}, {node.end})"
        if len(node.key) != node.num_units * self.unit_bytes:
            raise InvariantViolation(f"{name}: a key of {len(node.key)} bytes")
        if not node.is_root and not node.num_units:
            raise InvariantViolation(f"{name} is empty")
        if node.spans and len(node.spans) != node.num_units:
            raise InvariantViolation(f"{name}: {len(node.spans)} spans")
        least = node.first if node.is_root else node.first + 1
        if any(not least <= unit <= node.end for unit in node.points):
            raise InvariantViolation(f"{name}: points at {sorted(node.points)}")
        if node.locks < sum(child.locks for child in node.children.values()):
            raise InvariantViolation(f"{name} has fewer locks than its children")
        for unit, child in node.children.items():
            if child.parent is not node or child.first != node.end:
                raise InvariantViolation(f"{name}: child [{child.first}, {child.end})")
            if child.key[: self.unit_bytes] != unit:
                raise InvariantViolation(f"{name}: a child is filed under another's key")

    def _hash_units(self, node: Node[S, P], count: int) -> None:
        if node.parent is None:
            return
        link = node.hashes[-1] if node.hashes else node.parent.hashes[-1]
        for index in range(len(node.hashes), count):
            start = index * self.unit_bytes
            link = next_hash(link, node.key[start : start + self.unit_bytes])
            node.hashes.append(link)

    def _common_units(self, label: bytes, key: bytes, at: int, most: int) -> int:
        """Units that ``label`` and ``key[at:]`` share: at least 1, at most ``most``."""
        size = self.unit_bytes
        low, high = 1, most
        while low < high:
            middle = (low + high + 1) // 2
            if key.startswith(label[low * size : middle * size], at + low * size):
                low = middle
            else:
                high = middle - 1
        return low
