"""The tokens that a sequence has, as far as penalties look at them."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from stateferry.core.sampling import Penalties

# Places for tokens of the output, to begin with.
_ROOM = 64


class SeenTokens:
    """Distinct tokens of prompt and output, with how often the output holds each. Mutable.

    Sparse: a step costs in proportion to the tokens seen, not to the vocabulary.
    """

    def __init__(self, penalties: Penalties, prompt_ids: Iterable[int]) -> None:
        self._penalties = penalties
        distinct = list(dict.fromkeys(prompt_ids))
        self._places = {token_id: place for place, token_id in enumerate(distinct)}
        self._ids = np.array(distinct + [0] * _ROOM, dtype=np.int64)
        self._counts = np.zeros(len(self._ids), dtype=np.float32)

    def add_output(self, token_id: int) -> None:
        """One more output token."""
        place = self._place(token_id)  # Which may replace the array.
        self._counts[place] += 1

    def apply(self, logits: npt.NDArray[np.float32]) -> None:
        """Change ``logits`` (vocab_size,) of the tokens seen, in place."""
        penalties, seen = self._penalties, len(self._places)
        ids, counts = self._ids[:seen], self._counts[:seen]
        values = logits[ids]
        if penalties.look_at_prompt:
            factor = np.float32(penalties.repetition)
            values = np.where(values > 0, values / factor, values * factor)
        values -= counts * np.float32(penalties.frequency)
        values -= (counts > 0) * np.float32(penalties.presence)
        logits[ids] = values

    def _place(self, token_id: int) -> int:
        place = self._places.setdefault(token_id, len(self._places))
        if place == len(self._ids):
            self._ids = np.concatenate((self._ids, np.empty_like(self._ids)))
            self._counts = np.concatenate((self._counts, np.zeros_like(self._counts)))
        self._ids[place] = token_id
        return place
