"""Draws a token: the inverse of a cumulative distribution, in the order of token ids.

Which tokens are kept depends on how likely they are; the order in which the kept ones are laid out
on [0, 1) does not, so nothing has to be sorted for it::

    weight   exp((logit - largest logit) / temperature), single precision, of each kept token
    target   u * (sum of the weights), u in [0, 1)
    chosen   the first token, by id, at which the running sum exceeds the target

Sums run over fixed blocks in single and over blocks in double precision: a token's share is off by
1e-7 of itself at most, however many others there are, and a row's choice depends on nothing but the
row.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from stateferry.core.sampling import SamplingParams
from stateferry.engine.likeliest import likeliest

Floats = npt.NDArray[np.float32]
Places = npt.NDArray[np.int64]

_BLOCK = 256
# Tokens that are summed up one by one, and candidates for a nucleus that are tried first.
_FEW = 1024


def draw(logits: Floats, largest: float, params: SamplingParams, u: float) -> int:
    """A token id. logits (vocab_size,), not changed, none NaN; ``largest`` is their maximum and
    finite; ``params.temperature`` is above 0 and ``u`` in [0, 1)."""
    ids: Places | None = None
    if params.top_k:
        ids = likeliest(logits, params.top_k)
        logits = logits[ids]
    weights = relative_weights(logits, largest, params.temperature)
    if params.min_p > 0.0:
        # The likeliest token's weight is 1.
        weights *= weights >= np.float32(params.min_p)
    if params.top_p < 1.0:
        _keep_nucleus(weights, params.top_p)
    place = _locate(weights, u)
    return place if ids is None else int(ids[place])


def relative_weights(logits: Floats, largest: float, temperature: float) -> Floats:
    """exp((logits - largest) / temperature), (n,) -> (n,)."""
    # torch's operations do not complain of an overflow to -inf.
    shifted = torch.from_numpy(logits) - largest
    if temperature != 1.0:
        shifted.div_(temperature)
    weights: Floats = shifted.numpy()
    # numpy's exp: torch's takes up to 40 times as long where the result is tiny or 0, as it is for
    # most of a vocabulary at a low temperature or under a guide.
    return np.exp(weights, out=weights)


def total_weight(weights: Floats) -> float:
    """Sum of ``weights`` (n,), in the order of this module."""
    return float(_block_sums(weights).sum(dtype=np.float64))


def _keep_nucleus(weights: Floats, top_p: float) -> None:
    """Set all of ``weights`` (n,) to 0 but the smallest set of largest ones that holds ``top_p`` of
    their sum, in place; of equals, the first ones are kept. At least one is."""
    enough = top_p * total_weight(weights)
    descending = np.sort(_largest(weights, enough))[::-1]
    reached = np.cumsum(descending, dtype=np.float64)
    count = min(int(np.searchsorted(reached, enough, side="left")) + 1, len(descending))
    threshold = descending[count - 1]
    num_larger = int(np.count_nonzero(weights > threshold))
    too_many = np.flatnonzero(weights == threshold)[count - num_larger :]
    weights *= weights >= threshold
    weights[too_many] = 0.0


def _largest(weights: Floats, enough: float) -> Floats:
    """The largest of ``weights``, in any order, so many that they hold ``enough``.

    Most often these are few, and sorting everything would take most of a draw.
    """
    count = _FEW
    while count < len(weights) // 2:
        split = len(weights) - count
        largest: Floats = np.partition(weights, split)[split:]
        if largest.sum(dtype=np.float64) >= enough:
            return largest
        count *= 8
    return weights


def _locate(weights: Floats, u: float) -> int:
    """The first place at which the running sum exceeds ``u`` of the whole."""
    if len(weights) <= _FEW:
        running = np.cumsum(weights, dtype=np.float64)
        return _first_above(running, u * running[-1], weights)
    reached = np.cumsum(_block_sums(weights), dtype=np.float64)
    target = u * reached[-1]
    block = min(int(reached.searchsorted(target, side="right")), len(reached) - 1)
    before = reached[block - 1] if block else 0.0
    inside = weights[block * _BLOCK : (block + 1) * _BLOCK]
    running = np.cumsum(inside, dtype=np.float64)
    return block * _BLOCK + _first_above(running, target - before, inside)


def _first_above(running: npt.NDArray[np.float64], target: float, weights: Floats) -> int:
    place = int(running.searchsorted(target, side="right"))
    # The sum that the target is a part of may have been rounded up a little.
    return place if place < len(weights) else int(np.flatnonzero(weights)[-1])


def _block_sums(weights: Floats) -> Floats:
    full = weights.shape[0] // _BLOCK * _BLOCK
    # One order of summation per block, whatever the number of blocks or threads.
    sums: Floats = torch.from_numpy(weights[:full]).view(-1, _BLOCK).sum(dim=1).numpy()
    if full == weights.shape[0]:
        return sums
    rest = np.add.reduce(weights[full:], dtype=np.float64)
    return np.append(sums, np.float32(rest))
