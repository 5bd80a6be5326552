"""Requests of random lengths and ways of sampling, always the same for a seed."""

from __future__ import annotations

import random
from collections.abc import Sequence

from stateferry.core.request import GenerationRequest
from stateferry.core.sampling import SamplingParams, StopConditions
from support.tiny_model import EOS_ID


def random_requests(
    count: int,
    seed: int,
    *,
    lengths: Sequence[int] = (),
    max_prompt: int = 300,
    max_tokens: Sequence[int] = (1, 2, 17, 40),
) -> list[GenerationRequest]:
    """Half of the prompts have one of ``lengths``, if there are any, the others 1 to
    ``max_prompt``. All want log-probabilities."""
    rng = random.Random(seed)
    requests = []
    for number in range(count):
        chosen = lengths and rng.random() < 0.5
        length = rng.choice(lengths) if chosen else rng.randint(1, max_prompt)
        requests.append(
            GenerationRequest(
                request_id=f"random-{seed}-{number}",
                prompt_ids=tuple(rng.randrange(3, 259) for _ in range(length)),
                sampling=SamplingParams(
                    temperature=rng.choice([0.0, 0.0, 0.8, 1.3]),
                    top_k=rng.choice([0, 20]),
                    top_p=rng.choice([1.0, 0.9]),
                    seed=rng.getrandbits(64),
                    logprobs=0,
                ),
                stop=StopConditions(rng.choice(max_tokens), 0, frozenset({EOS_ID})),
            )
        )
    return requests
