"""Gives a request what its tokens are chosen by, before it may take any memory."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from stateferry.core.request import Continuation, GenerationRequest
from stateferry.engine.prompt_scores import PromptScores
from stateferry.engine.rules import RulesMaker, needs_rules


def steered(request: GenerationRequest, maker: RulesMaker) -> GenerationRequest:
    """``request`` with the rules and scores that it asks for. Blocks while a guide is compiled.

    Raises InvalidRequest naming the guide's field when it cannot be used.
    """
    scores = None
    if request.prompt_logprobs is not None:
        scores = PromptScores(request.prompt_ids, request.prompt_logprobs)
    rules = maker.make(request.sampling, request.seen_prompt_ids)
    return replace(request, rules=rules, scores=scores)


async def steered_soon(request: GenerationRequest, maker: RulesMaker) -> GenerationRequest:
    """As ``steered``; the event loop goes on meanwhile."""
    if request.sampling.guide is None:
        return steered(request, maker)
    return await asyncio.to_thread(steered, request, maker)


async def steered_continuation(request: Continuation, maker: RulesMaker) -> Continuation:
    """As ``steered_soon``, of a request whose token 0 another worker chooses."""
    if not needs_rules(request.sampling):
        return request
    rules = await asyncio.to_thread(maker.make, request.sampling, request.seen_prompt_ids)
    return replace(request, rules=rules)
