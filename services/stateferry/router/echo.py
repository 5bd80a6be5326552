"""Sends a prompt back to its client, in messages of bounded size."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from stateferry.api.answer_codec import PromptPart
from stateferry.core.errors import InvariantViolation
from stateferry.core.sampling import SampledToken

# With 20 candidates each, about half a megabyte of what gRPC lets through by default, 4 MB.
_TOKENS_PER_PART = 1024


class PromptEcho:
    """One prompt and its text."""

    def __init__(
        self,
        prompt_ids: Sequence[int],
        text: str,
        emit: Callable[[PromptPart], Awaitable[None]],
    ) -> None:
        self._prompt_ids = prompt_ids
        self._text = text
        self._emit = emit

    async def send_plain(self) -> None:
        """Without log-probabilities."""
        await self._send([SampledToken(token_id) for token_id in self._prompt_ids])

    async def send_scored(self, tokens: Sequence[SampledToken]) -> None:
        """As a worker scored it. Raises InvariantViolation when that is not this prompt."""
        if [token.token_id for token in tokens] != list(self._prompt_ids):
            raise InvariantViolation("a prefill worker scored another prompt")
        if any(token.logprob is None for token in tokens[1:]):
            raise InvariantViolation("a prefill worker left out a log-probability")
        await self._send(tokens)

    async def _send(self, tokens: Sequence[SampledToken]) -> None:
        text = self._text
        for start in range(0, len(tokens), _TOKENS_PER_PART):
            await self._emit(PromptPart(start, text, tuple(tokens[start:][:_TOKENS_PER_PART])))
            text = ""
