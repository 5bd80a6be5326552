"""Gives a request what its tokens are chosen by, before it may take any memory."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from stateferry.core.request import Continuation, GenerationRequest
from stateferry.engine.prompt_scores import PromptScores
from stateferry.engine.rules import RulesMaker, SequenceRules


def steered(request: GenerationRequest, maker: RulesMaker) -> GenerationRequest:
    """``request`` with the rules and scores that it asks for. Blocks while a guide is compiled.

    Raises InvalidRequest naming the guide's field when it cannot be used.
    """
    rules = _made(maker, request.continuation)
    return replace(request, rules=rules, scores=_scores(request))


class Steering:
    """The same beside an event loop, which goes on while a guide is compiled."""

    def __init__(self, maker: RulesMaker) -> None:
        self._maker = maker
        # Its own thread: hard guides must not take those that hand-offs are copied on.
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="guides")

    async def prompt(self, request: GenerationRequest) -> GenerationRequest:
        """As ``steered``."""
        rules = await self._rules(request.continuation)
        return replace(request, rules=rules, scores=_scores(request))

    async def continuation(self, request: Continuation) -> Continuation:
        """Of a request whose token 0 another worker chooses."""
        return replace(request, rules=await self._rules(request))

    def close(self) -> None:
        """Stop the thread; what it runs comes to its end first."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    async def _rules(self, request: Continuation) -> SequenceRules | None:
        if request.sampling.guide is None:
            return _made(self._maker, request)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, _made, self._maker, request)


def _made(maker: RulesMaker, request: Continuation) -> SequenceRules | None:
    rules = maker.make(request.sampling, request.seen_prompt_ids)
    if rules is not None:
        for index, token_id in enumerate(request.output_ids):
            rules.observe(index, token_id)
    return rules


def _scores(request: GenerationRequest) -> PromptScores | None:
    if request.prompt_logprobs is None:
        return None
    return PromptScores(request.prompt_ids, request.prompt_logprobs)
