"""Text to token ids and back. Text lives in the router; workers see ids only."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import tokenizers

from stateferry.core.errors import ModelError
from stateferry.router.stop_strings import StopMatch, StopMatcher

# A text this short is encoded in about a millisecond: less than a trip to a thread costs others.
_INLINE_CHARS = 4096
# Tokens of the prompt that decide how the first new one is written (a leading space, say).
_CONTEXT_TOKENS = 8
# Sizes that are tried: one of these begins with a character, and few prompts end with more special
# tokens than the last.
_CONTEXT_SIZES = (8, 7, 6, 5, 64)
# A character has at most 4 bytes, so at most 3 of them can be waiting for the rest, and a decoder
# writes each as at most one replacement character.
_MAX_UNDECIDED_CHARS = 3
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# The window that is decoded anew for each token: trimmed to the first size at the second.
_WINDOW_KEPT_TOKENS = 8
_WINDOW_MAX_TOKENS = 24


class Tokenizer:
    """A Hugging Face ``tokenizer.json``, with the special tokens its post-processor adds."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        # One thread: a long prompt delays other long prompts, and nobody else.
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenizer")

    @classmethod
    def from_directory(cls, model_dir: Path) -> Tokenizer:
        """Raises ModelError when the directory's tokenizer.json cannot be used."""
        try:
            return cls(tokenizers.Tokenizer.from_file(str(model_dir / "tokenizer.json")))
        # The library raises bare Exception from its Rust side.
        except Exception as error:
            raise ModelError(f"tokenizer.json: {error}") from error

    @property
    def vocab_size(self) -> int:
        """Ids the tokenizer knows; a model's vocabulary may be padded beyond it."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        """Token ids of ``text``; a long one does not hold up the event loop. Without
        ``add_special_tokens`` it holds those that it needs."""
        if len(text) <= _INLINE_CHARS:
            encoding = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
            return tuple(encoding.ids)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(
            self._executor, self._encode_long, text, add_special_tokens
        )

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of ``ids``."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def close(self) -> None:
        """Stop the thread; what it runs comes to its end first."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _encode_long(self, text: str, add_special_tokens: bool) -> tuple[int, ...]:
        # Of the library's calls, only those on a batch let go of the interpreter lock.
        [encoding] = self._tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)
        return tuple(encoding.ids)


class Detokenizer:
    """Turns ids into text as they come, never half a character.

    All pieces together are what the whole output adds to the prompt's text: ``decode(prompt +
    output)`` less ``decode(prompt)``. One exception: where a byte-fallback decoder meets a run of
    bytes that never becomes valid, it takes back characters it had written before; those stay.

    Decodes a bounded window of the last tokens at each step::

        window:   [ context or tokens written earlier ][ new token ]
        its text: [ written                           ][ new       ][ undecided ]
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt_ids: Sequence[int], *, skip_special_tokens: bool = True
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._window, self._written = self._context(prompt_ids)

    def push(self, token_id: int) -> str:
        """Text that became final with this token; may be empty."""
        self._window.append(token_id)
        text = self._decode(self._window)
        is_consistent = text.startswith(self._written)
        num_decided = _num_decided(text)
        if not is_consistent:
            # A byte-fallback decoder writes a run of bytes as replacement characters, all of it,
            # until the run's last character is complete.
            num_decided = len(text.rstrip(_REPLACEMENT))
        piece = text[len(self._written) : num_decided]
        if piece:
            self._written = text[:num_decided]
        if len(self._window) >= _WINDOW_MAX_TOKENS:
            self._trim(text, is_consistent)
        return piece

    def flush(self) -> str:
        """What is still undecided, at the end of the sequence."""
        text = self._decode(self._window)
        piece = text[len(self._written) :]
        self._written += piece
        return piece

    def _context(self, prompt_ids: Sequence[int]) -> tuple[list[int], str]:
        """The prompt's last tokens and their text: from the beginning of a character, if there is
        one, and up to where a last character is still incomplete."""
        for num_tokens in _CONTEXT_SIZES:
            context = list(prompt_ids[-num_tokens:])
            text, num_held = self._decode(context), 0
            while text.endswith(_REPLACEMENT) and num_held < _MAX_UNDECIDED_CHARS:
                num_held += 1
                text = self._decode(context[:-num_held])
            if text and not (text.startswith(_REPLACEMENT) or text.endswith(_REPLACEMENT)):
                return context, text
        context = list(prompt_ids[-_CONTEXT_TOKENS:])
        text = self._decode(context)
        return context, text[: _num_decided(text)]

    def _trim(self, text: str, is_consistent: bool) -> None:
        """Forget old tokens: at a place where the rest decodes to the same text without them."""
        for kept in range(_WINDOW_KEPT_TOKENS, _WINDOW_MAX_TOKENS if is_consistent else 0):
            rest = self._window[-kept:]
            rest_text = self._decode(rest)
            num_written = len(self._written) - (len(text) - len(rest_text))
            # The first character must be decided, or a cut inside it would go unnoticed.
            if num_written > 0 and _num_decided(rest_text) > 0 and text.endswith(rest_text):
                self._window, self._written = rest, rest_text[:num_written]
                return
        if len(self._window) >= 4 * _WINDOW_MAX_TOKENS:
            # Bytes that are no text at all. Bounded work matters more than their exact rendering.
            self._window = self._window[-_WINDOW_KEPT_TOKENS:]
            rest_text = self._decode(self._window)
            self._written = rest_text[: _num_decided(rest_text)]

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip_special_tokens)


@dataclass(frozen=True, slots=True)
class TextRules:
    """How a stream's text ends and what it leaves out. A stop id or string that comes before
    ``min_tokens`` is text like any other; later it is left out unless ``include_stop``."""

    stop_strings: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    min_tokens: int = 0
    include_stop: bool = False
    skip_special_tokens: bool = True


class OutputText:
    """The text of one stream: detokenised, and cut at the first stop id or string."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], rules: TextRules) -> None:
        self._detokenizer = Detokenizer(
            tokenizer, prompt_ids, skip_special_tokens=rules.skip_special_tokens
        )
        self._matcher = StopMatcher(rules.stop_strings, include=rules.include_stop)
        self._rules = rules
        self._num_tokens = 0

    def push(self, token_id: int) -> StopMatch:
        """Text that may be shown after this token, and the stop string that it completed."""
        self._num_tokens += 1
        rules = self._rules
        if self._may_stop and token_id in rules.stop_token_ids and not rules.include_stop:
            # The stream ends here; characters that are half there come with ``finish``.
            return StopMatch("", None)
        return self._matcher.push(self._detokenizer.push(token_id), self._may_stop)

    def finish(self) -> StopMatch:
        """The rest of the text, when no more tokens come."""
        last = self._matcher.push(self._detokenizer.flush(), self._may_stop)
        return last if last.matched else StopMatch(last.text + self._matcher.flush(), None)

    @property
    def _may_stop(self) -> bool:
        return self._num_tokens >= self._rules.min_tokens


def _num_decided(text: str) -> int:
    """Characters of ``text`` that no later token can change."""
    end = len(text)
    while end > 0 and len(text) - end < _MAX_UNDECIDED_CHARS and text[end - 1] == _REPLACEMENT:
        end -= 1
    return end
