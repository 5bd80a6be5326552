"""From logits to tokens, row by row: no row's choice depends on another.

The random number of an output token is a function of (seed, token index), so a stream can be
continued by any worker, in any batch.
"""

from __future__ import annotations

import hashlib
import struct

import torch

from stateferry.core.sampling import SampledToken, TokenLogprob
from stateferry.engine.forward_batch import SampleSpec


def sample(logits: torch.Tensor, specs: list[SampleSpec]) -> list[SampledToken | None]:
    """Choose one token per row. logits (num_rows, vocab_size) fp32, not changed.

    None stands for a row with a non-finite logit: nothing can be trusted there.
    """
    finite = torch.isfinite(logits).all(dim=-1).tolist()
    return [
        _sample_row(row, spec) if ok else None
        for row, spec, ok in zip(logits.unbind(0), specs, finite, strict=True)
    ]


def uniform(seed: int, index: int) -> float:
    """A number in [0, 1) for output token ``index`` of a stream with this 64-bit seed."""
    digest = hashlib.blake2b(struct.pack("<QQ", seed, index), digest_size=8).digest()
    return float(int.from_bytes(digest, "little") >> 11) * 2.0**-53


def _sample_row(logits: torch.Tensor, spec: SampleSpec) -> SampledToken:
    allowed = logits
    if spec.banned_ids:
        allowed = logits.clone()
        allowed[sorted(spec.banned_ids)] = -torch.inf
    params = spec.params
    token_id = _draw(allowed, spec) if params.temperature else int(allowed.argmax())
    if params.logprobs is None:
        return SampledToken(token_id)
    logprobs = torch.log_softmax(logits, dim=-1)
    top: tuple[TokenLogprob, ...] = ()
    if params.logprobs:
        values, ids = logprobs.topk(min(params.logprobs, logprobs.shape[0]))
        top = tuple(
            TokenLogprob(i, value) for i, value in zip(ids.tolist(), values.tolist(), strict=True)
        )
    return SampledToken(token_id, float(logprobs[token_id]), top)


def _draw(logits: torch.Tensor, spec: SampleSpec) -> int:
    """Inverse of the cumulative distribution over the kept tokens, likeliest first.

    Double precision, because a single-precision running sum over a large vocabulary would shift the
    rarest tokens' shares. A stable sort breaks ties by token id.
    """
    params = spec.params
    scaled, ids = (logits.double() / params.temperature).sort(descending=True, stable=True)
    if params.top_k:
        scaled, ids = scaled[: params.top_k], ids[: params.top_k]
    cumulative = torch.softmax(scaled, dim=-1).cumsum(dim=-1)
    kept = cumulative.shape[0]
    if params.top_p < 1.0:
        # Up to and including the token that reaches top_p; at least one.
        kept = min(kept, int((cumulative < params.top_p).sum()) + 1)
    target = uniform(params.seed, spec.index) * float(cumulative[kept - 1])
    position = int((cumulative[:kept] <= target).sum())
    return int(ids[min(position, kept - 1)])
