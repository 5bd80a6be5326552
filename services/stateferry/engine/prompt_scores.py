"""Log-probabilities of a prompt's own tokens, gathered while its slices are computed."""

from __future__ import annotations

import torch

from stateferry.core.errors import InvariantViolation
from stateferry.core.sampling import SampledToken
from stateferry.engine.logprobs import score_prompt


class PromptScores:
    """Of one request; mutable. The prompt's first token follows from nothing and has no score."""

    def __init__(self, prompt_ids: tuple[int, ...], num_top: int) -> None:
        self._prompt_ids = prompt_ids
        self._num_top = num_top
        self._tokens = [SampledToken(prompt_ids[0])]
        self._is_broken = False

    def add(self, start: int, logits: torch.Tensor) -> None:
        """The prompt's tokens from ``start`` gave ``logits`` (num_tokens, vocab_size)."""
        following = self._prompt_ids[start + 1 : start + 1 + len(logits)]
        if start + 1 != len(self._tokens):
            raise InvariantViolation(f"scores from {start} came after {len(self._tokens)} tokens")
        scored = score_prompt(logits[: len(following)], following, self._num_top)
        if scored is None:
            self._is_broken = True
            scored = [SampledToken(token_id) for token_id in following]
        self._tokens += scored

    def result(self) -> list[SampledToken]:
        """All tokens of a computed prompt. Raises InvariantViolation when a logit was not finite,
        or some were never seen."""
        if self._is_broken:
            raise InvariantViolation("the model's logits are not finite")
        if len(self._tokens) != len(self._prompt_ids):
            raise InvariantViolation(f"{len(self._tokens)} of {len(self._prompt_ids)} are scored")
        return self._tokens


def as_scores(scores: object) -> PromptScores | None:
    """What a request carries, whose type core does not know."""
    if scores is None or isinstance(scores, PromptScores):
        return scores
    raise InvariantViolation(f"a request carries {type(scores).__name__} as its scores")
