"""What is asked of a cache: conversations, and the order in which their turns come."""

from __future__ import annotations

from dataclasses import dataclass, field

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Turn:
    """``ids`` follow what was said so far; ``again`` asks for another answer to the prompt before
    instead, and says nothing new."""

    ids: Ids
    num_output: int
    again: bool = False


@dataclass(frozen=True)
class Workload:
    """``order`` names a conversation once for each of its turns."""

    name: str
    conversations: tuple[tuple[Turn, ...], ...]
    order: tuple[int, ...]

    @property
    def num_requests(self) -> int:
        return len(self.order)

    @property
    def most_tokens(self) -> int:
        """Of one request, prompt and output together."""
        return max(_most_tokens(turns) for turns in self.conversations)


def in_order(name: str, conversations: list[tuple[Turn, ...]]) -> Workload:
    """Conversations of one turn each, as they come."""
    return Workload(name, tuple(conversations), tuple(range(len(conversations))))


@dataclass
class Talk:
    """One conversation as it goes."""

    turns: tuple[Turn, ...]
    history: Ids = ()
    num_done: int = 0
    is_asking: bool = False
    _prompt_len: int = field(default=0, repr=False)

    def ask(self) -> tuple[Turn, Ids]:
        """The next turn and its whole prompt."""
        turn = self.turns[self.num_done]
        self.is_asking = True
        self.history = self.history[: self._prompt_len] if turn.again else self.history + turn.ids
        self._prompt_len = len(self.history)
        return turn, self.history

    def answer(self, ids: Ids) -> None:
        self.history += ids
        self.num_done += 1
        self.is_asking = False


class Desk:
    """Hands out the turns of a workload, in order, but none before its conversation's last answer
    is there."""

    def __init__(self, workload: Workload) -> None:
        self._talks = [Talk(turns) for turns in workload.conversations]
        self._order = list(workload.order)

    def __bool__(self) -> bool:
        """Whether there are turns left."""
        return bool(self._order)

    def next(self) -> Talk | None:
        """The first conversation in order that is not waiting for an answer."""
        for place, number in enumerate(self._order):
            if not self._talks[number].is_asking:
                del self._order[place]
                return self._talks[number]
        return None


def _most_tokens(turns: tuple[Turn, ...]) -> int:
    prompt = answers = most = 0
    for turn in turns:
        if not turn.again:
            prompt += answers + len(turn.ids)
        answers = turn.num_output
        most = max(most, prompt + answers)
    return most
