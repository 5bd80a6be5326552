"""What the choice of one sequence's next token depends on besides its logits."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from stateferry.core.errors import InvariantViolation, StateferryError
from stateferry.core.sampling import SamplingParams
from stateferry.engine.penalties import SeenTokens
from stateferry.guided.compiler import GuideCompiler
from stateferry.guided.matcher import GuideMatcher


class SequenceRules:
    """Penalties, biases and the guide of one sequence. Mutable: it must hear of every output token,
    in order. The sampler tells it of those that it chose; token 0 of a sequence that another worker
    began has to be told with ``observe``."""

    def __init__(
        self, params: SamplingParams, seen: SeenTokens | None, matcher: GuideMatcher | None
    ) -> None:
        self._bias_ids = np.array([i for i, _ in params.logit_bias], dtype=np.int64)
        self._biases = np.array([bias for _, bias in params.logit_bias], dtype=np.float32)
        self._seen = seen
        self._matcher = matcher
        self._num_observed = 0
        # Why no token could be chosen, once that has happened: the sequence cannot go on.
        self.failure: StateferryError | None = None

    def apply(self, logits: npt.NDArray[np.float32], index: int) -> None:
        """Change ``logits`` (vocab_size,) for the choice of output token ``index``, in place; what
        is out of the question gets -inf. Raises GuideBroke, InvariantViolation out of turn."""
        self._check_turn(index)
        if self._seen is not None:
            self._seen.apply(logits)
        logits[self._bias_ids] += self._biases
        if self._matcher is not None:
            np.copyto(logits, -np.inf, where=~self._matcher.allowed())

    def observe(self, index: int, token_id: int) -> None:
        """``token_id`` is output token ``index``. Raises as ``apply``."""
        self._check_turn(index)
        if self._seen is not None:
            self._seen.add_output(token_id)
        if self._matcher is not None:
            self._matcher.advance(token_id)
        self._num_observed += 1

    def _check_turn(self, index: int) -> None:
        if index != self._num_observed:
            raise InvariantViolation(f"token {index} came where {self._num_observed} was due")


class RulesMaker:
    """Makes the rules of sequences, of one model. Blocking where there is a guide to compile."""

    def __init__(self, guides: GuideCompiler) -> None:
        self._guides = guides

    def make(self, params: SamplingParams, prompt_ids: Iterable[int]) -> SequenceRules | None:
        """None when logits alone decide. ``prompt_ids`` in any order, for penalties that look at
        them. Raises InvalidRequest naming the guide's field when it cannot be used."""
        if not needs_rules(params):
            return None
        penalties = params.penalties
        seen = None
        if penalties.look_at_output:
            seen = SeenTokens(penalties, prompt_ids if penalties.look_at_prompt else ())
        matcher = None if params.guide is None else self._guides.matcher(params.guide)
        return SequenceRules(params, seen, matcher)


def needs_rules(params: SamplingParams) -> bool:
    """Whether tokens chosen before, biases or a guide take part in a choice."""
    return bool(params.penalties.look_at_output or params.logit_bias or params.guide is not None)


def as_rules(rules: object) -> SequenceRules | None:
    """What a request carries, whose type core does not know."""
    if rules is None or isinstance(rules, SequenceRules):
        return rules
    raise InvariantViolation(f"a request carries {type(rules).__name__} as its rules")


def why_no_token(rules: object) -> StateferryError:
    """What to tell the owner of a row, with these rules, that the sampler gave no token."""
    known = as_rules(rules)
    if known is not None and known.failure is not None:
        return known.failure
    return InvariantViolation("the model's logits are not finite")
