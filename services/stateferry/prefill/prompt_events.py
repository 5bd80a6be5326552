"""Scored prompt tokens, in messages of bounded size."""

from __future__ import annotations

from collections.abc import Iterator

from stateferry.api.worker_codec import prompt_tokens_event
from stateferry.engine.prompt_scores import PromptScores
from stateferry.v1 import worker_pb2

# With 20 candidates each, about half a megabyte of what gRPC lets through by default, 4 MB.
_TOKENS_PER_EVENT = 1024


def prompt_events(scores: PromptScores | None) -> Iterator[worker_pb2.PrefillEvent]:
    """Nothing when none were asked for. Raises InvariantViolation as PromptScores does."""
    tokens = [] if scores is None else scores.result()
    for start in range(0, len(tokens), _TOKENS_PER_EVENT):
        yield prompt_tokens_event(start, tokens[start : start + _TOKENS_PER_EVENT])
