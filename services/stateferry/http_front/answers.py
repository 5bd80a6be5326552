"""Results of a generation -> the JSON of OpenAI's two endpoints, in one piece or in chunks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from stateferry.api.answer_codec import Completion, Delta, PromptPart
from stateferry.core.sampling import SampledToken

# JSON has no minus infinity.
_LEAST_LOGPROB = -9999.0
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

TokenText = Callable[[int], str]


class Shape(Protocol):
    """What differs between the endpoints. Methods return an entry of ``choices``."""

    id_prefix: str
    whole_object: str
    chunk_object: str

    def opening(self, choice: int) -> dict[str, Any] | None:
        """What a choice's stream begins with, if with anything."""

    def piece(self, choice: int, text: str, logprobs: Any, reason: str | None) -> dict[str, Any]:
        """One chunk's."""

    def whole(self, choice: int, text: str, logprobs: Any, reason: str) -> dict[str, Any]:
        """The whole answer's."""

    def logprobs(self, tokens: Sequence[SampledToken], token_text: TokenText, offset: int) -> Any:
        """Of tokens whose text begins ``offset`` characters into the choice's."""


class ChatShape:
    """chat.completion and chat.completion.chunk."""

    id_prefix = "chatcmpl-"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def opening(self, choice: int) -> dict[str, Any] | None:
        delta = {"role": "assistant", "content": ""}
        return {"index": choice, "delta": delta, "logprobs": None, "finish_reason": None}

    def piece(self, choice: int, text: str, logprobs: Any, reason: str | None) -> dict[str, Any]:
        delta = {} if reason is not None else {"content": text}
        return {"index": choice, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

    def whole(self, choice: int, text: str, logprobs: Any, reason: str) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": choice, "message": message, "logprobs": logprobs, "finish_reason": reason}

    def logprobs(self, tokens: Sequence[SampledToken], token_text: TokenText, offset: int) -> Any:
        return {
            "content": [
                {
                    **_candidate(token_text(token.token_id), token.logprob),
                    "top_logprobs": [
                        _candidate(token_text(t.token_id), t.logprob) for t in token.top
                    ],
                }
                for token in tokens
            ],
            "refusal": None,
        }


class TextShape:
    """text_completion."""

    id_prefix = "cmpl-"
    whole_object = "text_completion"
    chunk_object = "text_completion"

    def opening(self, choice: int) -> dict[str, Any] | None:
        return None

    def piece(self, choice: int, text: str, logprobs: Any, reason: str | None) -> dict[str, Any]:
        return {"index": choice, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def whole(self, choice: int, text: str, logprobs: Any, reason: str) -> dict[str, Any]:
        return self.piece(choice, text, logprobs, reason)

    def logprobs(self, tokens: Sequence[SampledToken], token_text: TokenText, offset: int) -> Any:
        texts, offsets = [], []
        for token in tokens:
            texts.append(token_text(token.token_id))
            offsets.append(offset)
            offset += len(texts[-1])
        return {
            "tokens": texts,
            "token_logprobs": [_finite(token.logprob) for token in tokens],
            "top_logprobs": [_top(token, token_text) for token in tokens],
            "text_offset": offsets,
        }


@dataclass(slots=True)
class _Choice:
    texts: list[str] = field(default_factory=list)
    tokens: list[SampledToken] = field(default_factory=list)
    num_chars: int = 0
    completion: Completion | None = None


class Answer:
    """One answer, chunk by chunk or whole. It keeps tokens and texts: max_tokens bounds them."""

    def __init__(
        self,
        shape: Shape,
        request_id: str,
        model: str,
        num_choices: int,
        token_text: TokenText,
        *,
        logprobs: bool,
        include_usage: bool,
    ) -> None:
        self._shape = shape
        self._head = {"id": shape.id_prefix + request_id, "created": int(time.time())}
        self._model = model
        self._choices = [_Choice() for _ in range(num_choices)]
        self._token_text = token_text
        self._wants_logprobs = logprobs
        self._include_usage = include_usage

    def openings(self) -> list[dict[str, Any]]:
        """Chunks that come before all others."""
        found = (self._shape.opening(choice) for choice in range(len(self._choices)))
        return [self._chunk(opening) for opening in found if opening is not None]

    def add(self, event: Delta | PromptPart) -> dict[str, Any] | None:
        """Take an event; its chunk, None when there is nothing in it for a client."""
        index = event.choice if isinstance(event, Delta) else 0
        choice = self._choices[index]
        choice.texts.append(event.text)
        choice.tokens += event.tokens
        logprobs = self._logprobs(event.tokens, choice.num_chars) if event.tokens else None
        choice.num_chars += sum(len(self._token_text(t.token_id)) for t in event.tokens)
        if not event.text and logprobs is None:
            return None
        return self._chunk(self._shape.piece(index, event.text, logprobs, None))

    def finish(self, completion: Completion) -> dict[str, Any]:
        """Take a choice's end; its chunk."""
        self._choices[completion.choice].completion = completion
        reason = completion.finish_reason.value
        return self._chunk(self._shape.piece(completion.choice, "", None, reason))

    def usage_chunk(self) -> dict[str, Any] | None:
        """The last chunk, where it was asked for. All choices must have ended."""
        if not self._include_usage:
            return None
        return self._whole(self._shape.chunk_object, [], self._usage())

    def whole(self) -> dict[str, Any]:
        """The answer in one piece. All choices must have ended."""
        choices = []
        for index, choice in enumerate(self._choices):
            assert choice.completion is not None
            reason = choice.completion.finish_reason.value
            logprobs = self._logprobs(choice.tokens, 0)
            choices.append(self._shape.whole(index, "".join(choice.texts), logprobs, reason))
        return self._whole(self._shape.whole_object, choices, self._usage())

    def _logprobs(self, tokens: Sequence[SampledToken], offset: int) -> Any:
        if not self._wants_logprobs:
            return None
        return self._shape.logprobs(tokens, self._token_text, offset)

    def _chunk(self, entry: dict[str, Any]) -> dict[str, Any]:
        chunk = {
            **self._head,
            "object": self._shape.chunk_object,
            "model": self._model,
            "choices": [entry],
        }
        return {**chunk, "usage": None} if self._include_usage else chunk

    def _whole(self, kind: str, choices: Iterable[Any], usage: dict[str, Any]) -> dict[str, Any]:
        head = {**self._head, "object": kind, "model": self._model}
        return {**head, "choices": list(choices), "usage": usage}

    def _usage(self) -> dict[str, Any]:
        """The choices have one prompt; what was cached of it is choice 0's."""
        usages = [c.completion.usage for c in self._choices if c.completion is not None]
        prompt, generated = usages[0].prompt_tokens, sum(u.completion_tokens for u in usages)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": generated,
            "total_tokens": prompt + generated,
            "prompt_tokens_details": {"cached_tokens": usages[0].prefix_tokens},
        }


def _candidate(text: str, logprob: float | None) -> dict[str, Any]:
    # Of a part of a character there is no text to give the bytes of.
    as_bytes = None if _REPLACEMENT in text else list(text.encode())
    return {"token": text, "logprob": _finite(logprob), "bytes": as_bytes}


def _top(token: SampledToken, token_text: TokenText) -> dict[str, float | None] | None:
    """The likeliest tokens and the one that was taken; None for a prompt's first."""
    if token.logprob is None:
        return None
    top: dict[str, float | None] = {}
    for candidate in token.top:
        # Likeliest first; parts of characters all have the same text.
        top.setdefault(token_text(candidate.token_id), _finite(candidate.logprob))
    top.setdefault(token_text(token.token_id), _finite(token.logprob))
    return top


def _finite(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, _LEAST_LOGPROB)
