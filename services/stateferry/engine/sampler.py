"""From logits to tokens, row by row: no row's choice depends on another.

The random number of an output token is a function of (seed, token index), so a stream can be
continued by any worker, in any batch.
"""

from __future__ import annotations

import hashlib
import logging
import math
import struct

import numpy as np
import numpy.typing as npt
import torch

from stateferry.core.errors import GuideBroke, InvariantViolation
from stateferry.core.sampling import SampledToken
from stateferry.engine.draw import draw
from stateferry.engine.forward_batch import SampleSpec
from stateferry.engine.logprobs import score
from stateferry.engine.rules import needs_rules

log = logging.getLogger(__name__)


def sample(
    logits: torch.Tensor, specs: list[SampleSpec], likeliest: torch.Tensor | None = None
) -> list[SampledToken | None]:
    """Choose one token per row. logits (num_rows, vocab_size) fp32, not changed; the rules of specs
    are told of their choice. ``likeliest``: ``likeliest_rows`` of the logits, if they are known.

    None stands for a row with a non-finite logit, where nothing can be trusted, or one whose rules
    broke, which then say why.
    """
    ids, finite = likeliest_ids(logits, likeliest)
    if all(is_greedy(spec) for spec in specs):
        return _greedy(ids, finite)
    tokens: list[SampledToken | None] = []
    for row, spec, top_id, ok in zip(logits.cpu().numpy(), specs, ids, finite, strict=True):
        tokens.append(sample_row(row, top_id, spec) if ok else None)
    return tokens


def uniform(seed: int, index: int) -> float:
    """A number in [0, 1) for output token ``index`` of a stream with this 64-bit seed."""
    digest = hashlib.blake2b(struct.pack("<QQ", seed, index), digest_size=8).digest()
    return float(int.from_bytes(digest, "little") >> 11) * 2.0**-53


def greedy_tokens(likeliest: torch.Tensor) -> list[SampledToken | None]:
    """``sample`` of rows that ``is_greedy`` holds of, from their ``likeliest_rows``."""
    return _greedy(*likeliest.tolist())


def is_greedy(spec: SampleSpec) -> bool:
    """Whether the largest logit is all there is to it."""
    params = spec.params
    return not (
        params.temperature
        or params.logprobs is not None
        or spec.banned_ids
        or spec.rules is not None
        or needs_rules(params)
    )


def likeliest_rows(logits: torch.Tensor) -> torch.Tensor:
    """(2, num_rows) int64: of each row of logits (num_rows, vocab_size) the id of its largest, of
    equals the lowest, and whether all are finite."""
    return torch.stack((logits.argmax(dim=-1), torch.isfinite(logits).all(dim=-1)))


def _greedy(ids: list[int], finite: list[bool]) -> list[SampledToken | None]:
    return [SampledToken(i) if ok else None for i, ok in zip(ids, finite, strict=True)]


def likeliest_ids(
    logits: torch.Tensor, likeliest: torch.Tensor | None = None
) -> tuple[list[int], list[bool]]:
    """``likeliest_rows`` on the host, made of ``logits`` if they are not known."""
    if logits.device.type != "cpu":
        # One trip to the host for all rows.
        ids, finite = (likeliest_rows(logits) if likeliest is None else likeliest).tolist()
        return ids, finite
    rows = logits.numpy()
    # Twenty times as fast as torch's, which look at one number at a time.
    ids = rows.argmax(axis=-1)
    # A NaN is the argmax where there is one; +inf is as well, and -inf is the minimum.
    finite = np.isfinite(rows[np.arange(len(ids)), ids]) & np.isfinite(rows.min(axis=-1))
    return ids.tolist(), finite.tolist()


def sample_row(
    logits: npt.NDArray[np.float32], top_id: int, spec: SampleSpec
) -> SampledToken | None:
    """One row of ``sample``: finite logits (vocab_size,), of which ``top_id`` is the largest."""
    largest = float(logits[top_id])
    try:
        token_id = _choose(logits, top_id, spec)
    except (GuideBroke, InvariantViolation) as error:
        # Of this sequence's rules alone: its neighbours must not suffer.
        log.warning("no choice of output token %d: %s", spec.index, error)
        if spec.rules is not None:
            # A step that was launched before this was known only meets the consequences.
            spec.rules.failure = spec.rules.failure or error
        return None
    if spec.params.logprobs is None:
        return SampledToken(token_id)
    return score(logits, largest, token_id, spec.params.logprobs)


def _choose(logits: npt.NDArray[np.float32], top_id: int, spec: SampleSpec) -> int:
    params = spec.params
    if spec.rules is None and needs_rules(params):
        raise InvariantViolation("a request's rules were never made")
    if spec.rules is not None or spec.banned_ids:
        logits = logits.copy()
        if spec.rules is not None:
            spec.rules.apply(logits, spec.index)
        logits[list(spec.banned_ids)] = -np.inf
        top_id = int(logits.argmax())
    largest = float(logits[top_id])
    if not math.isfinite(largest):
        raise InvariantViolation("no token is left to choose")
    token_id = top_id
    if params.temperature:
        token_id = draw(logits, largest, params, uniform(params.seed, spec.index))
    if spec.rules is not None:
        spec.rules.observe(spec.index, token_id)
    return token_id
