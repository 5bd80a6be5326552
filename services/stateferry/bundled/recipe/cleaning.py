"""What counts as English prose, and one spelling for its punctuation."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

MIN_PARAGRAPH_CHARS = 70
MIN_FUNCTION_WORD_SHARE = 0.24
MIN_LETTER_SHARE = 0.93
MAX_HEADING_CHARS = 80

# A small model should not spend capacity on which glyph a typesetter chose.
PUNCTUATION = str.maketrans(
    {
        "\u2018": "'",
        "\u2019": "'",
        "\u201a": "'",
        "\u201c": '"',
        "\u201d": '"',
        "\u201e": '"',
        "\u2014": "--",
        "\u2013": "-",
        "\u2012": "-",
        "\u2010": "-",
        "\u2011": "-",
        "\u2026": "...",
        "\u00a0": " ",
        "\u00b6": None,
        "\u00ad": None,
        "\u200b": None,
        "\ufeff": None,
        "\u2192": "->",
        "\u00b4": "'",
        "\u0060": "'",
    }
)


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


FUNCTION_WORDS = _words(
    "the of and to a in that is was he for it with as his on be at by i this had not are but from "
    "or have an they which one you were her all she there would their we him been has when who "
    "will more no if out so said what up its about into than them can only other new some could "
    "these two may then do any my now such like our over me even most after also did many before "
    "must through where much your should well down because each just those how too thy thou shall "
    "unto ye upon us being does use used using"
)
WORD = re.compile(r"[A-Za-z]+(?:'[a-z]+)?")
SENTENCE_END = re.compile(r"[.!?:;][\"')\]]*$")
CODE_LIKE = re.compile(r"https?://|\w\(\)|::|[{}<>=|\\]{1}|\w_\w|\$\w|@\w|\w/\w+/")


def normalise(text: str) -> str:
    """NFC, one kind of quote and dash, single spaces."""
    plain = unicodedata.normalize("NFC", text).translate(PUNCTUATION)
    plain = re.sub(r"[ \t\r\n]+", " ", plain)
    return re.sub(r" ([,.;:!?])(?=\s|$)", r"\1", plain).strip()


def is_prose(text: str) -> bool:
    """True for a paragraph of sentences; false for tables, signatures, lists and code."""
    if len(text) < MIN_PARAGRAPH_CHARS or not SENTENCE_END.search(text):
        return False
    letters = sum(ch.isalpha() or ch in " ,.'\"-;:" for ch in text)
    if letters < MIN_LETTER_SHARE * len(text):
        return False
    if sum(ord(ch) > 127 for ch in text) > 0.03 * len(text):
        return False
    words = WORD.findall(text)
    common = sum(word.lower() in FUNCTION_WORDS for word in words)
    if len(words) < 10 or common < MIN_FUNCTION_WORD_SHARE * len(words):
        return False
    return len(CODE_LIKE.findall(text)) * 30 <= len(words)


def is_heading(text: str) -> bool:
    """True for a short heading made of words."""
    return (
        4 <= len(text) <= MAX_HEADING_CHARS
        and sum(ch.isalpha() or ch in " ,.'-:" for ch in text) >= 0.9 * len(text)
        and CODE_LIKE.search(text) is None
    )


def prose_document(blocks: Iterable[tuple[bool, str]]) -> list[str]:
    """Keep prose paragraphs, and a heading only when prose follows it directly."""
    kept: list[str] = []
    heading = ""
    for marked, raw in blocks:
        text = normalise(raw)
        if marked:
            heading = re.sub(r"^[\dA-Z]{0,3}(\.\d+)*\.?\s+(?=[A-Z])", "", text)
        elif is_prose(text):
            if heading and is_heading(heading):
                kept.append(heading)
            heading = ""
            kept.append(text)
    return kept


def pieces(paragraphs: list[str], limit_chars: int) -> list[list[str]]:
    """Cut a long text between paragraphs into documents of about `limit_chars`."""
    result: list[list[str]] = []
    size = limit_chars
    for paragraph in paragraphs:
        if size >= limit_chars:
            result.append([])
            size = 0
        result[-1].append(paragraph)
        size += len(paragraph)
    return result
