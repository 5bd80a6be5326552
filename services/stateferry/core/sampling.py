"""What a client may ask of the sampler, and when a sequence ends."""

from __future__ import annotations

import enum
from dataclasses import dataclass

# Most candidates that a token's log-probabilities may list.
MAX_LOGPROBS = 20


class FinishReason(enum.Enum):
    """Why a stream ended."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose a token from logits.

    ``temperature`` 0 is greedy; ``top_k`` 0 keeps all; ``top_p`` in (0, 1]; ``seed`` is 64-bit.
    Random numbers are a function of (seed, token index) alone, so a sampled stream depends neither
    on its batch mates nor on the worker that runs it. ``logprobs`` None returns none, n returns the
    chosen token's and those of the n most likely.
    """

    temperature: float
    top_k: int
    top_p: float
    seed: int
    logprobs: int | None


@dataclass(frozen=True, slots=True)
class StopConditions:
    """When to end a sequence, as far as token ids can tell.

    Stop strings need text, and text lives in the router; workers see ids only.
    ``stop_token_ids`` already holds the model's end-of-sequence ids unless the client ignored them.
    """

    max_tokens: int
    min_tokens: int
    stop_token_ids: frozenset[int]

    def check(self, token_id: int, num_output_tokens: int) -> FinishReason | None:
        """The reason to finish after ``token_id`` became output token number ``num_output_tokens``
        (counted from 1), or None to go on."""
        if token_id in self.stop_token_ids and num_output_tokens >= self.min_tokens:
            return FinishReason.STOP
        if num_output_tokens >= self.max_tokens:
            return FinishReason.LENGTH
        return None


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural-log probability of one candidate token, under the untempered distribution."""

    token_id: int
    logprob: float


@dataclass(frozen=True, slots=True)
class SampledToken:
    """One output token. ``logprob`` and ``top`` are filled when the request asked for logprobs."""

    token_id: int
    logprob: float | None = None
    top: tuple[TokenLogprob, ...] = ()
