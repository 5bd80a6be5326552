"""From an unpacked package to documents: one function per kind of file."""

from __future__ import annotations

import dataclasses
import gzip
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from stateferry.bundled.recipe import cleaning, html_text, sword
from stateferry.bundled.recipe.sources import Reader, Source

PIECE_CHARS = 6000
MIN_HTML_DOCUMENT_CHARS = 400
SYNSETS_PER_DOCUMENT = 40
PART_OF_SPEECH = {"n": "noun", "v": "verb", "a": "adjective", "s": "adjective", "r": "adverb"}


@dataclasses.dataclass
class Document:
    """`split_key` decides training or held-out, so related texts share one key."""

    doc_id: str
    split_key: str
    paragraphs: list[str]


def read_html(source: Source, path: Path, label: str) -> Iterator[Document]:
    """One document per page with enough prose on it."""
    page = path.read_text(encoding="utf-8", errors="replace")
    if source.tables_are_layout:
        page = re.sub(r"</?(?:table|tr|tbody)\b[^>]*>", "", page, flags=re.IGNORECASE)
    paragraphs = cleaning.prose_document(html_text.html_blocks(page))
    if sum(map(len, paragraphs)) >= MIN_HTML_DOCUMENT_CHARS:
        yield Document(label, label, paragraphs)


def read_sword_bible(source: Source, path: Path, label: str) -> Iterator[Document]:
    """One document per chapter; all translations of a chapter share a split key."""
    for name, text in sword.chapters(path):
        lines = [cleaning.normalise(line) for line in text.split("\n")]
        paragraphs = [line for line in lines if len(line) > 20]
        if paragraphs:
            title = name.replace(".", " ")
            yield Document(f"{label}/{name}", f"bible/{name}", [title, *paragraphs])


def read_sword_commentary(source: Source, path: Path, label: str) -> Iterator[Document]:
    """Commentary on one chapter, cut into pieces where it is long."""
    for name, text in sword.chapters(path):
        lines = [cleaning.normalise(line) for line in text.split("\n")]
        paragraphs = [line for line in lines if cleaning.is_prose(line)]
        cut = cleaning.pieces(paragraphs, 2 * PIECE_CHARS)
        for number, piece in enumerate(cut):
            # Short commentaries follow their chapter; pieces of a long one are split one by one.
            key = f"bible/{name}" if len(cut) == 1 else f"{label}/{name}/{number}"
            yield Document(f"{label}/{name}/{number}", key, piece)


def r_string_vectors(data: bytes) -> Iterator[list[str]]:
    """Character vectors out of an R lazy-load database of zlib chunks (XDR serialisation)."""
    offset = 0
    while offset < len(data):
        unpacker = zlib.decompressobj()
        raw = unpacker.decompress(data[offset + 4 :])  # 4 bytes of length precede each chunk
        offset = len(data) - len(unpacker.unused_data)
        start = raw.index(b"\x00\x00\x00\x10") + 4  # STRSXP
        (count,) = struct.unpack_from(">I", raw, start)
        cursor, strings = start + 4, list[str]()
        for _ in range(count):
            (size,) = struct.unpack_from(">i", raw, cursor + 4)
            strings.append(raw[cursor + 8 : cursor + 8 + max(size, 0)].decode("utf-8", "replace"))
            cursor += 8 + max(size, 0)
        yield strings


def line_paragraphs(lines: list[str]) -> list[str]:
    """Join hard-wrapped lines; blank lines separate paragraphs."""
    blocks = re.split(r"\n\s*\n", "\n".join(lines))
    joined = (cleaning.normalise(block.replace("_", "")) for block in blocks)
    return [text for text in joined if text]


def book_documents(label: str, paragraphs: list[str]) -> Iterator[Document]:
    """Novels and the like: dialogue is short, so the filter only removes non-text."""
    kept = [text for text in paragraphs if sum(map(str.isalpha, text)) > 0.6 * len(text)]
    for number, piece in enumerate(cleaning.pieces(kept, PIECE_CHARS)):
        yield Document(f"{label}/{number}", f"{label}/{number}", piece)


def read_r_strings(source: Source, path: Path, label: str) -> Iterator[Document]:
    """Books stored as character vectors, one line of text per element."""
    for number, lines in enumerate(r_string_vectors(path.read_bytes())):
        yield from book_documents(f"{label}/{number}", line_paragraphs(lines))


def read_plain(source: Source, path: Path, label: str) -> Iterator[Document]:
    """A plain text book, perhaps compressed, without its distributor's header and footer."""
    raw = path.read_bytes()
    raw = gzip.decompress(raw) if path.suffix in (".gz", ".dz") else raw
    text = raw.decode("utf-8", "replace").replace("\r\n", "\n")
    text = re.split(r"\*\*\* ?START OF.*\n", text)[-1]
    text = re.split(r"\*\*\* ?END OF|End of (?:the )?Project Gutenberg", text)[0]
    if source.name == "botchan":  # this copy lost its blank lines: one paragraph per line group
        text = re.sub(r"([.!?\"])\n(?=[A-Z\"])", r"\1\n\n", text)
    if source.name == "jargon":  # cross references are written {like this}, entries :like this:
        text = re.sub(r"[{}]", "", text)
        text = re.sub(r"^ *:([^:\n]+):", r"\1:", text, flags=re.MULTILINE)
        text = text[max(text.find("The Jargon Lexicon"), 0) :]
    paragraphs = line_paragraphs(text.split("\n"))
    if source.name in ("jargon", "opticks"):
        paragraphs = [p for p in paragraphs if cleaning.is_prose(p)]
    yield from book_documents(label, paragraphs)


def read_wordnet(source: Source, path: Path, label: str) -> Iterator[Document]:
    """Glosses as `lemma, lemma (noun): gloss; "example"`, forty to a document."""
    entries: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        head, _, gloss = line.partition(" | ")
        if line.startswith(" ") or not gloss:
            continue
        fields = head.split(" ")
        lemmas = [fields[4 + 2 * i].replace("_", " ") for i in range(int(fields[3], 16))]
        names = ", ".join(re.sub(r"\(\w+\)", "", lemma) for lemma in lemmas[:3])
        kind = PART_OF_SPEECH[fields[2]]
        entries.append(cleaning.normalise(f"{names} ({kind}): {gloss}."))
    for start in range(0, len(entries), SYNSETS_PER_DOCUMENT):
        name = f"{label}/{start}"
        yield Document(name, name, entries[start : start + SYNSETS_PER_DOCUMENT])


READERS: dict[Reader, Callable[[Source, Path, str], Iterator[Document]]] = {
    "html": read_html,
    "sword_bible": read_sword_bible,
    "sword_commentary": read_sword_commentary,
    "r_strings": read_r_strings,
    "plain": read_plain,
    "wordnet": read_wordnet,
}


def read_source(source: Source, root: Path) -> Iterator[Document]:
    """All documents of one unpacked package, in path order."""
    excluded = re.compile(source.exclude) if source.exclude else None
    paths = sorted({path for pattern in source.files for path in root.glob(pattern)})
    for path in paths:
        label = f"{source.name}/{path.relative_to(root).as_posix()}"
        if path.is_file() and not (excluded and excluded.search("/" + label)):
            yield from READERS[source.reader](source, path, label)
