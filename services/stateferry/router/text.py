"""Text to token ids and back. Text lives in the router; workers see ids only."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import tokenizers

from stateferry.core.errors import ModelError
from stateferry.router.stop_strings import StopMatch, StopMatcher

# A text this short is encoded in about a millisecond: less than a trip to a thread costs others.
_INLINE_CHARS = 4096
# Tokens of the prompt that decide how the first new one is written (a leading space, say).
_CONTEXT_TOKENS = 8
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

    async def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of ``text``; a long one does not hold up the event loop."""
        if len(text) <= _INLINE_CHARS:
            return tuple(self._tokenizer.encode(text).ids)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, self._encode_long, text)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids`` without special tokens."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def close(self) -> None:
        """Stop the thread; what it runs comes to its end first."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _encode_long(self, text: str) -> tuple[int, ...]:
        # Of the library's calls, only those on a batch let go of the interpreter lock.
        return tuple(self._tokenizer.encode_batch([text])[0].ids)


class Detokenizer:
    """Turns ids into text as they come, never half a character.

    All pieces together are what the whole output adds to the prompt's text: ``decode(prompt +
    output)`` less ``decode(prompt)``. One exception: where a byte-fallback decoder meets an invalid
    run of bytes, it takes back characters it had written before; those stay.

    Decodes a bounded window of the last tokens at each step::

        window:   [ context or tokens written earlier ][ new token ]
        its text: [ written: _num_written characters  ][ new       ][ undecided ]
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._window = list(prompt_ids[-_CONTEXT_TOKENS:])
        self._num_written = _num_decided(tokenizer.decode(self._window))

    def push(self, token_id: int) -> str:
        """Text that became final with this token; may be empty."""
        self._window.append(token_id)
        text = self._tokenizer.decode(self._window)
        num_decided = _num_decided(text)
        piece = text[self._num_written : num_decided]
        self._num_written = max(self._num_written, num_decided)
        if len(self._window) >= _WINDOW_MAX_TOKENS:
            self._trim(text)
        return piece

    def flush(self) -> str:
        """What is still undecided, at the end of the sequence."""
        text = self._tokenizer.decode(self._window)
        piece = text[self._num_written :]
        self._num_written = len(text)
        return piece

    def _trim(self, text: str) -> None:
        """Forget old tokens: at a place where the rest decodes to the same text without them."""
        for kept in range(_WINDOW_KEPT_TOKENS, _WINDOW_MAX_TOKENS):
            rest = self._window[-kept:]
            rest_text = self._tokenizer.decode(rest)
            num_written = self._num_written - (len(text) - len(rest_text))
            # The first character must be decided, or a cut inside it would go unnoticed.
            if num_written > 0 and _num_decided(rest_text) > 0 and text.endswith(rest_text):
                self._window, self._num_written = rest, num_written
                return
        if len(self._window) >= 4 * _WINDOW_MAX_TOKENS:
            # Bytes that are no text at all. Bounded work matters more than their exact rendering.
            self._window = self._window[-_WINDOW_KEPT_TOKENS:]
            self._num_written = _num_decided(self._tokenizer.decode(self._window))


class OutputText:
    """The text of one stream: detokenised, and cut at the first stop string."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        stop_strings: Sequence[str],
        min_tokens: int,
    ) -> None:
        self._detokenizer = Detokenizer(tokenizer, prompt_ids)
        self._matcher = StopMatcher(stop_strings)
        self._min_tokens = min_tokens
        self._num_tokens = 0

    def push(self, token_id: int) -> StopMatch:
        """Text that may be shown after this token, and the stop string that it completed."""
        self._num_tokens += 1
        return self._matcher.push(self._detokenizer.push(token_id), self._may_stop)

    def finish(self) -> StopMatch:
        """The rest of the text, when no more tokens come."""
        last = self._matcher.push(self._detokenizer.flush(), self._may_stop)
        return last if last.matched else StopMatch(last.text + self._matcher.flush(), None)

    @property
    def _may_stop(self) -> bool:
        return self._num_tokens >= self._min_tokens


def _num_decided(text: str) -> int:
    """Characters of ``text`` that no later token can change."""
    end = len(text)
    while end > 0 and len(text) - end < _MAX_UNDECIDED_CHARS and text[end - 1] == _REPLACEMENT:
        end -= 1
    return end
