"""Reader for SWORD modules: zlib blocks addressed by a verse index, OSIS markup inside."""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

BLOCK = struct.Struct("<III")  # offset, compressed size, uncompressed size
SHORT_ENTRY = struct.Struct("<IIH")  # block, offset in block, size: block files named .b??
LONG_ENTRY = struct.Struct("<III")  # the same with 32-bit sizes: block files named .c??

CHAPTER = re.compile(r'<chapter n="[^"]*" osisID="([^"]+)"')
NOTE = re.compile(r"<note\b.*?</note>", re.DOTALL)
TITLE = re.compile(r"<title\b[^>]*>.*?</title>", re.DOTALL)
PARAGRAPH = re.compile(r'<div[^>]*type="x-p"[^>]*/>|<lb\b[^>]*/>|<l\b[^>]*sID[^>]*/>|</?p>|\xb6')
TAG = re.compile(r"<[^>]*>")
ENTITIES = {"&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": '"', "&apos;": "'"}


def entries(block_index: Path) -> Iterator[str]:
    """Yield the raw OSIS text of every verse entry of one testament, in canon order.

    Consecutive index entries that point at the same text (a comment on several verses) yield once.
    """
    verse_index = block_index.with_suffix(block_index.suffix[:-1] + "v")
    data = block_index.with_suffix(block_index.suffix[:-1] + "z").read_bytes()
    layout = LONG_ENTRY if block_index.suffix.startswith(".c") else SHORT_ENTRY
    blocks = list(BLOCK.iter_unpack(block_index.read_bytes()))
    opened, text = -1, b""
    previous: tuple[int, int, int] | None = None
    for entry in layout.iter_unpack(verse_index.read_bytes()):
        block, start, size = entry
        if size == 0 or entry == previous:
            continue
        previous = entry
        if block != opened:
            offset, packed, _ = blocks[block]
            text, opened = zlib.decompress(data[offset : offset + packed]), block
        yield text[start : start + size].decode("utf-8", "replace")


def plain_text(osis: str) -> str:
    """Drop notes, titles and tags; paragraph marks become newlines."""
    text = TITLE.sub("\n", NOTE.sub("", osis))
    text = TAG.sub("", PARAGRAPH.sub("\n", text))
    for entity, char in ENTITIES.items():
        text = text.replace(entity, char)
    return text


def chapters(block_index: Path) -> Iterator[tuple[str, str]]:
    """Yield `(osis id such as Gen.1, plain text with newlines between paragraphs)`."""
    name, parts = "", list[str]()
    for entry in entries(block_index):
        found = CHAPTER.search(entry)
        if found:
            if name:
                yield name, "".join(parts)
            name, parts = found.group(1), []
        parts.append(plain_text(entry) + " ")
    if name:
        yield name, "".join(parts)
