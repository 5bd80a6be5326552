"""The tree against what it stands for: a dictionary from path to value."""

from __future__ import annotations

import random

import pytest

from stateferry.core.errors import InvariantViolation
from stateferry.prefix.prefix_hash import chain_hashes, encode_tokens
from stateferry.prefix.radix_tree import MAX_NODE_UNITS, Node, RadixTree, Walk

GRID = 2
UNIT = GRID * 4
SPACE = b"n" * 32

Tree = RadixTree[int, str]


def key_of(units: str) -> bytes:
    """One unit per letter."""
    return b"".join(encode_tokens([ord(letter)] * GRID) for letter in units)


def insert(tree: Tree, units: str, space: bytes = SPACE) -> Node[int, str]:
    """Make the whole path exist; each new unit's value is its place."""
    key = key_of(units)
    walk = tree.walk(tree.plant(space), key, len(units))
    node = tree.node_at(walk, walk.units)
    if walk.units < len(units):
        node = tree.grow(node, key[walk.units * UNIT :], list(range(walk.units, len(units))))
    tree.check_structure()
    return node


def matched(tree: Tree, units: str, space: bytes = SPACE) -> int:
    root = tree.root(space)
    return 0 if root is None else tree.walk(root, key_of(units), len(units)).units


def spans(node: Node[int, str] | None) -> list[int]:
    """Values of all units from the root to the node's end."""
    values: list[int] = []
    while node is not None:
        values = node.spans + values
        node = node.parent
    return values


def test_what_was_put_in_is_found_as_far_as_it_goes() -> None:
    tree = Tree(UNIT)
    assert matched(tree, "abc") == 0
    insert(tree, "abcdef")
    for units, expected in [("", 0), ("a", 1), ("abc", 3), ("abcdef", 6), ("abcdefg", 6)]:
        assert matched(tree, units) == expected
    for units, expected in [("x", 0), ("ax", 1), ("abcdex", 5), ("abcxef", 3)]:
        assert matched(tree, units) == expected


def test_a_walk_goes_no_further_than_it_may() -> None:
    tree = Tree(UNIT)
    insert(tree, "abcdef")
    root = tree.plant(SPACE)
    for most in range(8):
        assert tree.walk(root, key_of("abcdef"), most).units == min(most, 6)
        # A part of a unit is no unit.
        assert tree.walk(root, key_of("abcdef")[:-1], most).units == min(most, 5)


def test_a_split_keeps_values_with_their_part_and_the_lower_one_its_identity() -> None:
    tree = Tree(UNIT)
    node = insert(tree, "abcdef")
    node.points = {2: "two", 3: "three", 6: "six"}
    node.last_used = 7
    assert tree.lock(node) == 6 and tree.lock(node) == 0
    assert tree.unlock(node) == 0
    before = tree.hash_at(node, 5)
    upper = tree.split(node, 3)
    tree.check_structure()
    assert (upper.first, upper.end, upper.points) == (0, 3, {2: "two", 3: "three"})
    assert (node.first, node.end, node.points) == (3, 6, {6: "six"})
    assert spans(node) == [0, 1, 2, 3, 4, 5] and spans(upper) == [0, 1, 2]
    assert upper.locks == node.locks == 1 and upper.last_used == 7
    assert tree.hash_at(node, 5) == before
    assert tree.lock(upper) == 0 and tree.unlock(node) == 3 and tree.unlock(upper) == 3
    assert upper.locks == node.locks == 0 == tree.plant(SPACE).locks


def test_branches_part_at_a_unit() -> None:
    tree = Tree(UNIT)
    one, other = insert(tree, "abcdef"), insert(tree, "abcxyz")
    assert one.parent is other.parent and one.parent is not None and one.parent.end == 3
    assert tree.num_nodes == 3
    third = insert(tree, "abc")
    assert third is one.parent and tree.num_nodes == 3


def test_namespaces_see_nothing_of_each_other() -> None:
    tree = Tree(UNIT)
    insert(tree, "abc", b"one" * 8)
    assert matched(tree, "abc", b"two" * 8) == 0
    insert(tree, "abd", b"two" * 8)
    assert matched(tree, "abc", b"one" * 8) == 3 and matched(tree, "abc", b"two" * 8) == 2
    assert tree.hash_at(insert(tree, "abc", b"one" * 8), 3) != tree.hash_at(
        insert(tree, "abc", b"two" * 8), 3
    )


def test_trimming_a_leaf_takes_its_values_away() -> None:
    tree = Tree(UNIT)
    node = insert(tree, "abcd")
    node.points = {1: "one", 4: "four"}
    tree.hash_at(node, 4)
    tree.trim(node, 3)
    tree.check_structure()
    assert node.points == {1: "one"} and node.spans == [0, 1, 2] and len(node.hashes) == 3
    assert matched(tree, "abcd") == 3
    tree.trim(node, 0)
    tree.check_structure()
    assert tree.num_nodes == 0 and matched(tree, "abcd") == 0
    tree.uproot(SPACE)
    assert tree.root(SPACE) is None


def test_what_would_break_the_tree_is_refused() -> None:
    tree = Tree(UNIT)
    node = insert(tree, "abcd")
    insert(tree, "abx")
    upper = node.parent
    assert upper is not None
    with pytest.raises(InvariantViolation):
        tree.trim(upper, 1)
    with pytest.raises(InvariantViolation):
        tree.split(node, 2)
    with pytest.raises(InvariantViolation):
        tree.split(node, 4)
    with pytest.raises(InvariantViolation):
        tree.grow(upper, key_of("xy"), [2, 3])
    with pytest.raises(InvariantViolation):
        tree.grow(node, key_of("e"), [4, 5])
    with pytest.raises(InvariantViolation):
        tree.grow(node, key_of("e")[:-1])
    with pytest.raises(InvariantViolation):
        tree.unlock(node)
    with pytest.raises(InvariantViolation):
        tree.uproot(SPACE)
    tree.check_structure()


def test_a_long_key_is_a_chain_of_nodes_of_bounded_length() -> None:
    tree = Tree(UNIT)
    text = "".join(random.Random(1).choices("ab", k=3 * MAX_NODE_UNITS + 5))
    node = insert(tree, text)
    assert tree.num_nodes == 4 and max(n.num_units for n in tree) == MAX_NODE_UNITS
    assert node.end == len(text) and spans(node) == list(range(len(text)))
    for units in (1, MAX_NODE_UNITS, MAX_NODE_UNITS + 1, len(text)):
        assert matched(tree, text[:units] + "x") == units


def test_broken_structure_is_named() -> None:
    tree = Tree(UNIT)
    node = insert(tree, "abcd")
    node.spans.pop()
    with pytest.raises(InvariantViolation, match=r"\[0, 4\): 3 spans"):
        tree.check_structure()


def test_hashes_are_the_chain_of_the_path_whatever_was_split() -> None:
    tree = Tree(UNIT)
    rng = random.Random(5)
    texts = ["".join(rng.choices("ab", k=rng.randint(1, 12))) for _ in range(40)]
    for text in texts:
        insert(tree, text)
        some = rng.choice(texts[: texts.index(text) + 1])
        root = tree.plant(SPACE)
        walk = tree.walk(root, key_of(some), len(some))
        expected = chain_hashes(SPACE, key_of(some), GRID)
        for unit in rng.sample(range(walk.node.first, walk.units + 1), 1):
            found = tree.hash_at(walk.node, unit)
            assert found == (expected[unit - 1] if unit else SPACE)


@pytest.mark.parametrize("seed", range(6))
def test_random_walk_agrees_with_a_dictionary(seed: int) -> None:
    """Insert, mark, split and trim at random; the model maps each path to its values."""
    rng, tree = random.Random(seed), Tree(UNIT)
    units: dict[str, int] = {}
    points: dict[str, str] = {}
    done = dict.fromkeys(("insert", "mark", "split", "trim"), 0)
    for step in range(600):
        text = "".join(rng.choices("abc", k=rng.randint(1, 9)))
        root = tree.plant(SPACE)
        walk = tree.walk(root, key_of(text), len(text))
        assert walk.units == max(n for n in range(len(text) + 1) if not n or text[:n] in units)
        action = rng.choice(sorted(done))
        done[action] += act(tree, walk, text, action, step, units, points)
        tree.check_structure()
        found = {path_of(node, unit): p for node in tree for unit, p in node.points.items()}
        assert found == points
    assert all(done.values()), done
    for text, value in units.items():
        walk = tree.walk(tree.plant(SPACE), key_of(text), len(text))
        assert walk.units == len(text)
        assert walk.node.spans[len(text) - 1 - walk.node.first] == value


def act(
    tree: Tree,
    walk: Walk[int, str],
    text: str,
    action: str,
    step: int,
    units: dict[str, int],
    points: dict[str, str],
) -> bool:
    """Do it in both; whether there was something to do."""
    node, depth = walk.node, walk.units
    if action == "insert" and depth < len(text):
        at = tree.node_at(walk, depth)
        values = [step * 100 + unit for unit in range(depth, len(text))]
        tree.grow(at, key_of(text)[depth * UNIT :], values)
        units |= {text[: depth + 1 + i]: value for i, value in enumerate(values)}
        return True
    if action == "mark" and depth:
        node.points[depth] = points[text[:depth]] = str(step)
        return True
    if action == "split" and node.first < depth < node.end:
        assert tree.node_at(walk, depth).end == depth
        return True
    if action == "trim" and depth and not node.children:
        gone = {path for path in units if path.startswith(path_of(node, node.end))}
        assert gone == {path_of(node, node.end)}
        gone = {path_of(node, unit) for unit in range(depth, node.end + 1)}
        tree.trim(node, depth - 1)
        for path in gone:
            del units[path]
            points.pop(path, None)
        return True
    return False


def path_of(node: Node[int, str], unit: int) -> str:
    key = node.key[: (unit - node.first) * UNIT]
    parent = node.parent
    while parent is not None:
        key = parent.key + key
        parent = parent.parent
    return "".join(chr(key[at]) for at in range(0, len(key), UNIT))
