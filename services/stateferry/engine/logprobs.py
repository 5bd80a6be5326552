"""Log-probabilities of tokens by the model alone, before anything that sampling does."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from stateferry.core.sampling import SampledToken, TokenLogprob
from stateferry.engine.draw import relative_weights, total_weight
from stateferry.engine.likeliest import likeliest


def score(
    logits: npt.NDArray[np.float32], largest: float, token_id: int, num_top: int
) -> SampledToken:
    """``token_id`` with its log-probability and those of the ``num_top`` likeliest tokens, of
    equals the lowest ids first. logits (vocab_size,), finite, not changed; ``largest`` is their
    maximum."""
    norm = largest + math.log(total_weight(relative_weights(logits, largest, 1.0)))
    top: list[TokenLogprob] = []
    if num_top:
        ids = likeliest(logits, num_top)
        order = np.argsort(-logits[ids], kind="stable")
        top = [TokenLogprob(int(i), _logprob(logits, int(i), norm)) for i in ids[order]]
    return SampledToken(token_id, _logprob(logits, token_id, norm), tuple(top))


def score_prompt(
    logits: torch.Tensor, token_ids: Sequence[int], num_top: int
) -> list[SampledToken] | None:
    """Scores of prompt tokens that are known. logits (n, vocab_size) fp32, not changed; row i says
    what comes next, which is ``token_ids[i]``. None when a logit is not finite."""
    scored = []
    for row, token_id in zip(logits.cpu().numpy(), token_ids, strict=True):
        largest = float(row.max())
        if not (math.isfinite(largest) and math.isfinite(row.min())):
            return None
        scored.append(score(row, largest, token_id, num_top))
    return scored


def _logprob(logits: npt.NDArray[np.float32], token_id: int, norm: float) -> float:
    # Rounded as the wire carries it: every worker and every client sees the same number.
    return float(np.float32(float(logits[token_id]) - norm))
