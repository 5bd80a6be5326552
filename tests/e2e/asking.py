"""One request through a cluster, as a client sends it."""

from __future__ import annotations

from stateferry.client import Client, Completion, Delta, GenerateOptions
from stateferry.core.request import GenerationRequest


async def ask(
    client: Client, request: GenerationRequest
) -> tuple[list[int], list[float], Completion]:
    sampling, ids, logprobs = request.sampling, [], []
    options = GenerateOptions(
        max_tokens=request.stop.max_tokens,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        seed=sampling.seed,
        logprobs=0,
        # Without stop ids in the request, the model's own are not wanted either.
        ignore_eos=not request.stop.stop_token_ids,
        request_id=request.request_id,
        timeout_s=60,
    )
    completion: Completion | None = None
    async for event in client.generate(request.prompt_ids, options):
        if isinstance(event, Delta):
            if event.token_ids:
                assert event.index == len(ids), "a gap or a repetition in the stream"
            ids += event.token_ids
            logprobs += event.logprobs
        else:
            completion = event
    assert completion is not None
    return ids, logprobs, completion
