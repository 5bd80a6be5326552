"""One choice's stream to its client: indices, text and times.

It outlives the attempts that feed it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from stateferry.api.answer_codec import Delta, PromptPart
from stateferry.core.clock import Clock
from stateferry.core.errors import InvariantViolation
from stateferry.core.sampling import SampledToken
from stateferry.router.observer import RouterObserver
from stateferry.router.text import OutputText

Emit = Callable[[Delta | PromptPart], Awaitable[None]]


class ClientStream:
    """Forwards tokens in order, each exactly once; stops at the first stop string.

    ``emit`` waits until gRPC has taken the delta, so nothing piles up here; a slow client's tokens
    wait at its decode worker, max_tokens of them at most.
    """

    def __init__(
        self,
        text: OutputText,
        emit: Emit,
        arrived_s: float,
        clock: Clock,
        observer: RouterObserver,
        choice: int = 0,
    ) -> None:
        self._text = text
        self._emit = emit
        self._arrived_s = arrived_s
        self._clock = clock
        self._observer = observer
        self._choice = choice
        self._last_token_s = 0.0
        self._first_token_s = 0.0
        self.token_ids: list[int] = []
        self.matched_stop: str | None = None
        self._has_stalled = False

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def ttft_s(self) -> float:
        return self._first_token_s - self._arrived_s

    @property
    def decode_s(self) -> float:
        return self._last_token_s - self._first_token_s

    @property
    def total_s(self) -> float:
        return self._clock.monotonic_s() - self._arrived_s

    async def push(self, index: int, tokens: Sequence[SampledToken]) -> None:
        """Forward tokens up to a stop string; ``matched_stop`` tells whether there was one.

        Raises InvariantViolation when ``index`` is not the one that is due.
        """
        if index != self.num_tokens:
            raise InvariantViolation(f"token {index} came where token {self.num_tokens} was due")
        pieces = []
        taken = 0
        for token in tokens:
            match = self._text.push(token.token_id)
            pieces.append(match.text)
            taken += 1
            self.matched_stop = match.matched
            if match.matched is not None:
                break
        self.token_ids += (token.token_id for token in tokens[:taken])
        self._measure(taken)
        await self._emit(Delta(index, "".join(pieces), tuple(tokens[:taken]), self._choice))

    async def finish(self) -> None:
        """Send the text that was held back. It may still complete a stop string."""
        if self.matched_stop is not None:
            return
        last = self._text.finish()
        self.matched_stop = last.matched
        if last.text:
            await self._emit(Delta(self.num_tokens, last.text, (), self._choice))

    def stall(self) -> None:
        """The attempt that fed it failed; another one will."""
        self._has_stalled = True

    def _measure(self, num_new: int) -> None:
        now_s = self._clock.monotonic_s()
        if self._has_stalled:
            self._has_stalled = False
            self._observer.resumed(now_s - (self._last_token_s or self._arrived_s))
        if self._first_token_s == 0.0:
            self._first_token_s = now_s
            self._observer.first_token(now_s - self._arrived_s)
        else:
            for _ in range(num_new):
                self._observer.inter_token((now_s - self._last_token_s) / num_new)
        self._last_token_s = now_s
