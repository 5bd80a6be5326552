"""One sequence's place in its guide: which tokens may come next."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from stateferry.core.errors import GuideBroke, InvariantViolation

_MAX_PROBLEM_CHARS = 300


class Automaton(Protocol):
    """The part of llguidance's matcher that a sequence needs."""

    def unsafe_compute_mask_ptr(self, trg_pointer: int, trg_byte_size: int) -> None: ...

    def consume_token(self, token_id: int) -> bool: ...

    def get_error(self) -> str: ...


class GuideMatcher:
    """Mutable, one per sequence. ``vocab_size`` is the model's."""

    def __init__(self, automaton: Automaton, vocab_size: int) -> None:
        self._automaton = automaton
        self._vocab_size = vocab_size
        self._bits = np.zeros((vocab_size + 31) // 32, dtype=np.uint32)

    def allowed(self) -> npt.NDArray[np.bool_]:
        """(vocab_size,) which tokens may come next; never all false.

        Raises GuideBroke when the matcher hit a limit of its own.
        """
        bits = self._bits
        self._automaton.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
        error = self._automaton.get_error()
        if error:
            raise _broken(error)
        # The library packs the lowest id into the lowest bit of 32.
        octets = bits.astype("<u4", copy=False).view(np.uint8)
        flags = np.unpackbits(octets, count=self._vocab_size, bitorder="little").view(np.bool_)
        if not flags.any():
            raise InvariantViolation("a guide allows no token")
        return flags

    def advance(self, token_id: int) -> None:
        """``token_id`` was chosen of those allowed. Raises GuideBroke when the matcher hit a limit
        of its own."""
        if not self._automaton.consume_token(token_id):
            raise _broken(self._automaton.get_error())


def _broken(error: str) -> GuideBroke:
    text = " ".join(error.replace("<non-verbose/>", "").split())
    return GuideBroke(f"guide: is too complex to go on: {text[:_MAX_PROBLEM_CHARS]}")
