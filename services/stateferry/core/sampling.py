"""What a client may ask of the sampler, and when a sequence ends."""

from __future__ import annotations

import enum
import hashlib
import struct
from dataclasses import dataclass

from stateferry.core.guide import Guide

# Most candidates that a token's log-probabilities may list.
MAX_LOGPROBS = 20
MAX_CHOICES = 16
MAX_TEMPERATURE = 100.0
# Of presence and frequency penalties, in both directions.
MAX_PENALTY = 2.0
# Logits are divided by it and must stay finite; single precision holds it exactly.
MIN_REPETITION_PENALTY = 1 / 64
MAX_REPETITION_PENALTY = 10.0
MAX_LOGIT_BIAS = 100.0
MAX_LOGIT_BIAS_IDS = 1024


class FinishReason(enum.Enum):
    """Why a stream ended."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class Penalties:
    """Pushes logits of tokens that were there before; the definitions are vLLM's.

    A token of the prompt or the output has its logit divided by ``repetition`` where it is
    positive, multiplied where not. Then a token of the output loses ``frequency`` per occurrence
    and ``presence`` once.
    """

    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0

    @property
    def look_at_prompt(self) -> bool:
        return self.repetition != 1.0

    @property
    def look_at_output(self) -> bool:
        return self.look_at_prompt or self.presence != 0.0 or self.frequency != 0.0


NO_PENALTIES = Penalties()


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose a token from logits.

    In this order: ``penalties``; ``logit_bias`` (token id, added to its logit); the ``guide``'s
    tokens only; ``temperature``, where 0 is greedy and ends the list; ``min_p``, tokens at least
    that share of the likeliest one's probability; ``top_k``, 0 keeps all; ``top_p`` in (0, 1], of
    what is left. ``seed`` is 64-bit. Random numbers are a function of (seed, token index) alone, so
    a sampled stream depends neither on its batch mates nor on the worker that runs it.
    ``logprobs`` None returns none, n returns the chosen token's and those of the n most likely,
    all of the model's own distribution, before anything in this list.
    """

    temperature: float
    top_k: int
    top_p: float
    seed: int
    logprobs: int | None
    min_p: float = 0.0
    penalties: Penalties = NO_PENALTIES
    logit_bias: tuple[tuple[int, float], ...] = ()
    guide: Guide | None = None


def choice_seed(seed: int, choice: int) -> int:
    """The seed of choice number ``choice`` of a request with this ``seed``: the request's own for
    choice 0, else the first 8 bytes, little endian, of the BLAKE2b digest of both as 64-bit little
    endian numbers, personalised with ``choice``."""
    if choice == 0:
        return seed
    packed = struct.pack("<QQ", seed, choice)
    digest = hashlib.blake2b(packed, digest_size=8, person=b"choice").digest()
    return int.from_bytes(digest, "little")


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
    """One output token, or one of the prompt that was scored. ``logprob`` and ``top`` are filled
    when the request asked for them."""

    token_id: int
    logprob: float | None = None
    top: tuple[TokenLogprob, ...] = ()
