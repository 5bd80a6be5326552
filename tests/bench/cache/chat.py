"""Conversations of several turns, many open at a time, some of them under the same instructions."""

from __future__ import annotations

import random
from dataclasses import dataclass

from bench.cache.workload import Ids, Turn, Workload


@dataclass(frozen=True)
class ChatShape:
    """Ranges are in tokens, or turns, both ends included. ``open_at_once`` conversations wait for
    their user's next message at any time. ``again_share`` of the turns ask for another answer."""

    conversations: int = 64
    open_at_once: int = 24
    turns: tuple[int, int] = (2, 8)
    instructions: int = 5
    instruction_tokens: tuple[int, int] = (60, 400)
    message_tokens: tuple[int, int] = (10, 160)
    answer_tokens: tuple[int, int] = (6, 40)
    again_share: float = 0.08


def chat(
    seed: int, vocab_size: int, shape: ChatShape | None = None, name: str = "chat"
) -> Workload:
    """The same for a seed."""
    shape = shape or ChatShape()
    rng = random.Random(seed)

    def ids(length: tuple[int, int]) -> Ids:
        return tuple(rng.randrange(3, vocab_size) for _ in range(rng.randint(*length)))

    instructions = [ids(shape.instruction_tokens) for _ in range(shape.instructions)]
    conversations = []
    for _ in range(shape.conversations):
        first = rng.choice(instructions) + ids(shape.message_tokens)
        turns = [Turn(first, rng.randint(*shape.answer_tokens))]
        for _ in range(rng.randint(*shape.turns) - 1):
            again = rng.random() < shape.again_share
            said = () if again else ids(shape.message_tokens)
            turns.append(Turn(said, rng.randint(*shape.answer_tokens), again))
        conversations.append(tuple(turns))
    left = {number: len(turns) for number, turns in enumerate(conversations)}
    waiting = list(left)
    is_open: list[int] = []
    order = []
    while waiting or is_open:
        while waiting and len(is_open) < shape.open_at_once:
            is_open.append(waiting.pop(0))
        number = rng.choice(is_open)
        order.append(number)
        left[number] -= 1
        if not left[number]:
            is_open.remove(number)
    return Workload(name, tuple(conversations), tuple(order))
