"""Build the corpus: fetch, clean, split by document, and keep the two sides apart."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from stateferry.bundled.recipe import fetch, readers
from stateferry.bundled.recipe.readers import Document
from stateferry.bundled.recipe.sources import SOURCES, Source

HELDOUT_PER_MILLE = 15
SHINGLE_WORDS = 8
MAX_SHARED_SHINGLES = 0.2
WORD = re.compile(r"[a-z]+")


@dataclasses.dataclass
class SourceStats:
    """Characters are counted after cleaning; `*_bytes` are UTF-8."""

    documents: int = 0
    train_bytes: int = 0
    heldout_bytes: int = 0
    repeated_paragraphs: int = 0
    leaking_paragraphs: int = 0


def stable_hash(text: str) -> int:
    """64-bit hash that is the same on every machine and in every run."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def is_heldout(document: Document) -> bool:
    """Whole documents are held out, by a hash of their split key."""
    return stable_hash(document.split_key) % 1000 < HELDOUT_PER_MILLE


def shingles(text: str, stride: int) -> list[int]:
    """Hashes of runs of eight words; Python's own hash is enough within one run."""
    words = WORD.findall(text.lower())
    last = max(len(words) - SHINGLE_WORDS + 1, 1)
    return [hash(tuple(words[i : i + SHINGLE_WORDS])) for i in range(0, last, stride)]


def drop_repeats(
    documents: Iterable[Document], seen: set[int], stats: SourceStats
) -> Iterator[Document]:
    """Remove paragraphs that occurred before anywhere in the corpus (licences, boilerplate)."""
    for document in documents:
        kept = []
        for paragraph in document.paragraphs:
            key = stable_hash(" ".join(WORD.findall(paragraph.lower())))
            if key in seen and len(paragraph) > 40:
                stats.repeated_paragraphs += 1
                continue
            seen.add(key)
            kept.append(paragraph)
        if sum(map(len, kept)) >= 120:
            document.paragraphs = kept
            yield document


def drop_leaks(document: Document, heldout: set[int], stats: SourceStats) -> str:
    """Text of a training document without paragraphs that share word runs with held-out text."""
    kept = []
    for paragraph in document.paragraphs:
        runs = shingles(paragraph, stride=2)
        shared = sum(run in heldout for run in runs)
        if shared > MAX_SHARED_SHINGLES * len(runs):
            stats.leaking_paragraphs += 1
        else:
            kept.append(paragraph)
    return "\n\n".join(kept)


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_rows(path: Path) -> Iterator[dict[str, str]]:
    """Yield `{"source", "id", "text"}` records of train.jsonl or heldout.jsonl."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def _collect(work: Path, stats: dict[str, SourceStats]) -> list[tuple[Source, Document]]:
    seen: set[int] = set()
    collected: list[tuple[Source, Document]] = []
    for source in SOURCES:
        root = fetch.fetch(source, work)
        own = stats[source.name] = SourceStats()
        documents = list(drop_repeats(readers.read_source(source, root), seen, own))
        own.documents = len(documents)
        collected.extend((source, document) for document in documents)
        size = sum(len(p) for document in documents for p in document.paragraphs)
        print(f"{source.name:24} {len(documents):6} documents {size / 1e6:8.2f} M characters")
    return collected


def build(work: Path) -> dict[str, SourceStats]:
    """Write `text/train.jsonl`, `text/heldout.jsonl` and `text/stats.json` below `work`."""
    folder = work / "text"
    folder.mkdir(parents=True, exist_ok=True)
    stats: dict[str, SourceStats] = {}
    collected = _collect(work, stats)
    heldout_rows: list[dict[str, Any]] = []
    heldout_runs: set[int] = set()
    for source, document in collected:
        if is_heldout(document):
            text = "\n\n".join(document.paragraphs)
            heldout_rows.append({"source": source.name, "id": document.doc_id, "text": text})
            stats[source.name].heldout_bytes += len(text.encode())
            for paragraph in document.paragraphs:
                heldout_runs.update(shingles(paragraph, stride=1))
    train_rows: list[dict[str, Any]] = []
    for source, document in collected:
        if not is_heldout(document):
            text = drop_leaks(document, heldout_runs, stats[source.name])
            if text:
                train_rows.append({"source": source.name, "id": document.doc_id, "text": text})
                stats[source.name].train_bytes += len(text.encode())
    # Mixed order, so that a prefix of either file is a fair sample of all sources.
    for rows in (heldout_rows, train_rows):
        rows.sort(key=lambda row: stable_hash("order/" + row["id"]))
    _write(folder / "heldout.jsonl", heldout_rows)
    _write(folder / "train.jsonl", train_rows)
    table = {name: dataclasses.asdict(value) for name, value in stats.items()}
    (folder / "stats.json").write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    return stats
