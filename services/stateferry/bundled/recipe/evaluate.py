"""Bits per byte on held-out documents, against xz and a byte 5-gram, and sample completions."""

from __future__ import annotations

import dataclasses
import json
import lzma
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from stateferry.bundled.recipe import export, ngram, tokenizer
from stateferry.bundled.recipe.corpus import read_rows
from stateferry.bundled.recipe.model import LanguageModel
from stateferry.bundled.recipe.sources import SOURCES
from stateferry.bundled.recipe.tokenizer import END_OF_TEXT_ID

NGRAM_ORDER = 5
LOGIT_ROWS = 4096
SAMPLE_BYTES = 60_000
SAMPLE_DOCUMENT_BYTES = 8_000
DOCUMENT_SEPARATOR = "\f"
SAMPLE_LICENCES = ("public domain", "Apache-2.0")
COMPLETION_TOKENS = 80
TEMPERATURE = 0.7
TOP_P = 0.95
PROMPTS = (
    "It was a fine morning, and",
    "The old man looked at her and said",
    "In the beginning",
    "A database index is",
    "The purpose of this chapter is to",
    "She had never been so happy in her life, for",
    "When the server receives a request,",
    "The light of the sun",
)


@torch.no_grad()
def document_bits(model: LanguageModel, encoded: Tokenizer, text: str, device: str) -> float:
    """Bits to predict a document and its end, given only that a document starts."""
    ids = [END_OF_TEXT_ID, *encoded.encode(text).ids, END_OF_TEXT_ID]
    sequence = torch.tensor(ids, device=device)
    hidden = model.backbone(sequence[None, :-1])[0]
    nats = 0.0
    for start in range(0, len(hidden), LOGIT_ROWS):
        rows = hidden[start : start + LOGIT_ROWS]
        logits = model.logits(rows).float()
        targets = sequence[start + 1 : start + 1 + len(rows)]
        nats += float(F.cross_entropy(logits, targets, reduction="sum"))
    return nats / math.log(2)


def _pick(logits: Tensor, generator: torch.Generator) -> int:
    """Nucleus sampling of one token from logits (vocab_size,)."""
    ordered, order = torch.sort(torch.softmax(logits / TEMPERATURE, dim=-1), descending=True)
    ordered[ordered.cumsum(-1) - ordered > TOP_P] = 0
    return int(order[torch.multinomial(ordered, 1, generator=generator)])


@torch.no_grad()
def complete(model: LanguageModel, encoded: Tokenizer, prompt: str, seed: int, device: str) -> str:
    """Sample a continuation; the whole text is run again per token, which is short enough."""
    generator = torch.Generator().manual_seed(seed)
    ids = [END_OF_TEXT_ID, *encoded.encode(prompt).ids]
    for _ in range(COMPLETION_TOKENS):
        logits = model(torch.tensor([ids], device=device))[0, -1]
        token = _pick(logits.float().cpu(), generator)
        if token == END_OF_TEXT_ID:
            break
        ids.append(token)
    return str(encoded.decode(ids))


@dataclasses.dataclass
class _Total:
    bits: float = 0.0
    size_bytes: int = 0

    def bits_per_byte(self) -> float:
        return round(self.bits / max(self.size_bytes, 1), 4)


def model_figures(
    model: LanguageModel, encoded: Tokenizer, rows: list[dict[str, str]], device: str
) -> dict[str, Any]:
    """Bits per byte over all documents and per source."""
    whole, by_source = _Total(), dict[str, _Total]()
    for row in rows:
        bits = document_bits(model, encoded, row["text"], device)
        for total in (whole, by_source.setdefault(row["source"], _Total())):
            total.bits += bits
            total.size_bytes += len(row["text"].encode())
    table = {name: total.bits_per_byte() for name, total in sorted(by_source.items())}
    return {"model_bits_per_byte": whole.bits_per_byte(), "by_source": table}


def xz_bits_per_byte(texts: list[str]) -> float:
    """`xz -9` on the documents joined by an empty line."""
    joined = "\n\n".join(texts).encode()
    return round(8 * len(lzma.compress(joined, preset=9)) / len(joined), 4)


def ngram_bits_per_byte(work: Path, texts: list[str]) -> float:
    """Kneser-Ney byte 5-gram trained on all training text, on the same documents."""
    train = [row["text"].encode() for row in read_rows(work / "text" / "train.jsonl")]
    levels = ngram.fit(ngram.to_symbols(train), NGRAM_ORDER)
    documents = [text.encode() for text in texts]
    bits = ngram.total_bits(levels, ngram.to_symbols(documents))
    return round(bits / sum(map(len, documents)), 4)


def heldout_sample(rows: list[dict[str, str]]) -> str:
    """Whole short documents, up to about 60 KB, one form feed between two documents.

    Only public domain and Apache-2.0 text, which can be shipped without further notices.
    """
    licences = {source.name: source.licence for source in SOURCES}
    chosen: list[str] = []
    size = 0
    for row in rows:
        if not licences[row["source"]].startswith(SAMPLE_LICENCES):
            continue
        text = row["text"]
        length = len(text.encode())
        if length <= SAMPLE_DOCUMENT_BYTES and size + length <= SAMPLE_BYTES:
            chosen.append(text)
            size += length
    return DOCUMENT_SEPARATOR.join(chosen)


def evaluate(work: Path, model_dir: Path, device: str, *, ngram_too: bool = True) -> None:
    """Write `evaluation.json` into the model directory and print it."""
    model = export.load_exported(model_dir).to(device)
    encoded = tokenizer.load(model_dir)
    rows = list(read_rows(work / "text" / "heldout.jsonl"))
    texts = [row["text"] for row in rows]
    tokens = sum(len(encoding.ids) + 1 for encoding in encoded.encode_batch_fast(texts))
    report: dict[str, Any] = {
        "heldout_bytes": sum(len(text.encode()) for text in texts),
        "heldout_documents": len(texts),
        "heldout_tokens": tokens,
        "parameters": sum(p.numel() for p in model.parameters()),
        "weights_bytes": (model_dir / "model.safetensors").stat().st_size,
        **model_figures(model, encoded, rows, device),
        "xz_9_bits_per_byte": xz_bits_per_byte(texts),
    }
    if ngram_too:
        report["byte_5gram_bits_per_byte"] = ngram_bits_per_byte(work, texts)
    sample = heldout_sample(rows)
    sample_rows = [{"source": "", "text": text} for text in sample.split(DOCUMENT_SEPARATOR)]
    sample_figures = model_figures(model, encoded, sample_rows, device)
    report["sample_bits_per_byte"] = sample_figures["model_bits_per_byte"]
    report["completions"] = [
        complete(model, encoded, prompt, seed, device) for seed, prompt in enumerate(PROMPTS)
    ]
    text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
    (model_dir / "evaluation.json").write_text(text, encoding="utf-8")
    sample_path = model_dir.parent / "heldout_sample.txt"
    sample_path.write_text(sample, encoding="utf-8")
    print(text)
