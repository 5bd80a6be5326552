"""Streams of a real client that must not show what happens behind the router."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from stateferry.client import Client, Completion, Delta, GenerateOptions

_REGEX = "([a-z]{3,9} ){30}"


@dataclass
class Stream:
    """One request and what came of it."""

    prompt: tuple[int, ...]
    options: GenerateOptions
    ids: list[int] = field(default_factory=list)
    bits: list[str] = field(default_factory=list)
    text: str = ""
    end: Completion | None = None
    # Between two deltas, seconds.
    longest_gap_s: float = 0.0
    last_s: float = 0.0
    grown: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self, client: Client) -> None:
        """To its end. Raises AssertionError for a gap or a token that came twice."""
        async for event in client.generate(self.prompt, self.options):
            now_s = time.monotonic()
            if isinstance(event, Delta):
                assert event.index == len(self.ids), "a gap, or a token twice"
                if self.last_s:
                    self.longest_gap_s = max(self.longest_gap_s, now_s - self.last_s)
                self.last_s = now_s
                self.ids += event.token_ids
                self.bits += map(float.hex, event.logprobs)
                self.text += event.text
            elif isinstance(event, Completion):
                self.end = event
            self.grown.set()

    async def has(self, count: int) -> None:
        """Wait for so many tokens, or the end."""
        async with asyncio.timeout(30):
            while len(self.ids) < count and self.end is None:
                self.grown.clear()
                await self.grown.wait()

    @property
    def answer(self) -> tuple[list[int], list[str], str, str]:
        assert self.end is not None
        return self.ids, self.bits, self.text, self.end.finish_reason

    @property
    def attempts(self) -> int:
        assert self.end is not None
        return self.end.attempts

    def again(self) -> Stream:
        """The same request, not begun."""
        return Stream(self.prompt, self.options)


def mixed_streams(
    count: int, seed: int, *, tokens: int, lengths: Sequence[int], vocab: int = 259
) -> list[Stream]:
    """Greedy and sampled, some with penalties, some with a guide, of all ``lengths`` of prompts."""
    rng = random.Random(seed)
    made = []
    for n in range(count):
        options = GenerateOptions(
            max_tokens=tokens,
            ignore_eos=n % 5 != 4,
            logprobs=0,
            seed=n,
            temperature=0.0 if n % 2 else 0.9,
            regex=_REGEX if n % 5 == 4 else None,
            frequency_penalty=0.4 if n % 3 == 0 else 0.0,
            presence_penalty=0.2 if n % 3 == 0 else 0.0,
            repetition_penalty=1.2 if n % 3 == 0 else 1.0,
        )
        prompt = tuple(rng.randrange(3, vocab) for _ in range(rng.choice(lengths)))
        made.append(Stream(prompt, options))
    return made


async def run_all(client: Client, streams: Sequence[Stream], timeout_s: float = 60.0) -> None:
    """Until all have ended."""
    async with asyncio.timeout(timeout_s):
        await asyncio.gather(*(stream.run(client) for stream in streams))
