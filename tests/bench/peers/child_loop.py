"""The child's side of a contender: one request per line, one answer per line, both JSON.

Children run in the Python of their peer, so this imports nothing but the standard library. Between
two requests a child waits for a line, asleep.
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

# The first ids are padding, begin and end.
_FIRST_ID = 3

Sample = Callable[[list[list[int]], int], dict[str, Any]]
Load = Callable[[dict[str, Any]], tuple[str, int, Sample]]


def draw_prompts(batch: int, tokens: int, vocab_size: int, seed: int) -> list[list[int]]:
    """Random ids, the same for every contender that is asked with the same seed."""
    source = random.Random(seed)
    return [[source.randrange(_FIRST_ID, vocab_size) for _ in range(tokens)] for _ in range(batch)]


def serve(load: Load) -> None:
    """``load`` gets the first request and returns version, vocabulary size and the function that
    continues prompts greedily by so many tokens. That one returns ``first_s`` to the first tokens,
    ``rest_s`` from there to the end, ``rest_tokens`` of that time, and the first ``tokens``."""
    lines = _private_stdout()
    version, vocab_size, sample = load(next(lines))
    _answer({"version": version})
    for request in lines:
        prompts = draw_prompts(
            request["batch"], request["prompt_tokens"], vocab_size, request["seed"]
        )
        _answer(sample(prompts, request["new_tokens"]))


_out = sys.stdout


def _answer(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), file=_out, flush=True)


def _private_stdout() -> Iterator[dict[str, Any]]:
    """Libraries print what they like: it goes to stderr, answers to where stdout was."""
    global _out
    _out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        yield json.loads(line)
