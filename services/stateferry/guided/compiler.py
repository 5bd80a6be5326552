"""Compiles guides for one model's tokens, each of them once."""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from pathlib import Path

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from stateferry.core.errors import GuideBroke, InvalidRequest, InvariantViolation
from stateferry.core.guide import Guide
from stateferry.guided.grammar import grammar_text, refusal
from stateferry.guided.matcher import GuideMatcher

# A compiled guide takes up to a few megabytes; this many are kept.
_MAX_COMPILED = 64
# A guide that needs more in one step than about 30 ms or 20 MB is refused, or fails its request.
_LIMITS = LLParserLimits(
    initial_lexer_fuel=500_000,
    step_lexer_fuel=200_000,
    step_max_items=20_000,
    max_lexer_states=20_000,
    max_grammar_size=50_000,
    verbose_errors=False,
)


class GuideCompiler:
    """Blocking, for any thread. The tokenizer is read by ``load``, or else at the first guide."""

    def __init__(
        self, tokenizer_file: Path, vocab_size: int, eos_token_ids: frozenset[int]
    ) -> None:
        self._tokenizer_file = tokenizer_file
        self._vocab_size = vocab_size
        self._eos_token_ids = sorted(eos_token_ids)
        self._tokenizer: LLTokenizer | InvalidRequest | None = None
        self._compiled: OrderedDict[Guide, LLMatcher] = OrderedDict()
        # One at a time: a second thread would compile the same guide again.
        self._lock = threading.Lock()

    def load(self) -> None:
        """Read the tokenizer now. That holds the interpreter lock, for seconds if the vocabulary is
        large, in which a process that serves already would answer nobody.

        Never raises: with a tokenizer that cannot be used, each guide is refused.
        """
        if self._eos_token_ids:
            with self._lock, contextlib.suppress(InvalidRequest):
                self._loaded()

    def matcher(self, guide: Guide) -> GuideMatcher:
        """A matcher at the beginning of ``guide``.

        Raises InvalidRequest naming the guide's field when it cannot be compiled within the limits,
        or when this model cannot be guided.
        """
        with self._lock:
            prototype = self._compiled.get(guide)
            if prototype is None:
                prototype = self._compile(guide)
                self._compiled[guide] = prototype
                if len(self._compiled) > _MAX_COMPILED:
                    self._compiled.popitem(last=False)
            self._compiled.move_to_end(guide)
            return GuideMatcher(prototype.deep_copy(), self._vocab_size)

    def _compile(self, guide: Guide) -> LLMatcher:
        if not self._eos_token_ids:
            raise InvalidRequest("guide", "this model has no end-of-sequence token to end it with")
        matcher = LLMatcher(self._loaded(), grammar_text(guide), log_level=0, limits=_LIMITS)
        if matcher.is_error():
            raise refusal(guide, matcher.get_error())
        try:
            self._try_out(matcher)
        except (GuideBroke, InvariantViolation) as error:
            raise refusal(guide, str(error)) from error
        return matcher

    def _try_out(self, matcher: LLMatcher) -> None:
        """Most of the work comes with the first steps, whose limits must hold as well."""
        GuideMatcher(matcher.deep_copy(), self._vocab_size).allowed()
        # The first step builds, in what copies share, what the second finds to be over a limit.
        second = GuideMatcher(matcher.deep_copy(), self._vocab_size)
        begins = second.allowed()
        begins[self._eos_token_ids] = False
        if begins.any():
            second.advance(int(begins.argmax()))
            second.allowed()

    def _loaded(self) -> LLTokenizer:
        if self._tokenizer is None:
            try:
                self._tokenizer = LLTokenizer(
                    str(self._tokenizer_file),
                    n_vocab=self._vocab_size,
                    eos_token=self._eos_token_ids,
                )
            # The library raises whatever its Rust side meets.
            except Exception as error:
                self._tokenizer = InvalidRequest("guide", f"not with this tokenizer: {error}")
        if isinstance(self._tokenizer, InvalidRequest):
            raise self._tokenizer
        return self._tokenizer
