"""Text that others wrote, made safe for a terminal."""

from __future__ import annotations

# All control characters but newline and tab: a model may emit escape sequences.
_UNSAFE = {code: "\ufffd" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}


def printable(text: str) -> str:
    """``text`` with each control character replaced, newlines and tabs kept."""
    return text.translate(_UNSAFE)
