"""Byte-level BPE: every string encodes, decoding gives the same bytes back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from stateferry.bundled.recipe.corpus import read_rows

VOCAB_SIZE = 4096
END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 0
TRAINING_SAMPLE_CHARS = 24_000_000
ENCODE_BATCH = 512


def train(work: Path, target: Path) -> None:
    """Learn the merges on a mixed prefix of the training text; write the tokenizer's two files."""

    def sample() -> Iterator[str]:
        taken = 0
        for row in read_rows(work / "text" / "train.jsonl"):
            if taken >= TRAINING_SAMPLE_CHARS:
                return
            taken += len(row["text"])
            yield row["text"]

    tokenizer = Tokenizer(models.BPE())
    # No prefix space: the encoding of a text must not depend on what a caller put before it.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample(), trainer)
    target.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(target / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1_000_000,
    }
    text = json.dumps(settings, indent=2) + "\n"
    (target / "tokenizer_config.json").write_text(text, encoding="utf-8")


def load(folder: Path) -> Tokenizer:
    """Open the tokenizer of a model directory."""
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def encode_documents(tokenizer: Tokenizer, texts: list[str]) -> npt.NDArray[np.uint16]:
    """Token ids of all texts, an end-of-text token before each and one after the last.

    The token is bos and eos at once, so a document is read as [eot] text [eot] wherever it stands.
    """
    parts = [np.array([END_OF_TEXT_ID], dtype=np.uint16)]
    for start in range(0, len(texts), ENCODE_BATCH):
        for encoding in tokenizer.encode_batch_fast(texts[start : start + ENCODE_BATCH]):
            parts.append(np.array([*encoding.ids, END_OF_TEXT_ID], dtype=np.uint16))
    return np.concatenate(parts)


def write_arrays(work: Path, folder: Path) -> None:
    """Encode both splits to `work/train`: `<split>.bin` (uint16) and `<split>.json`.

    Training text is grouped by source, because sources are drawn with different weights; the json
    file lists `[source, first token, tokens, bytes]`.
    """
    tokenizer = load(folder)
    target = work / "train"
    target.mkdir(parents=True, exist_ok=True)
    for split in ("train", "heldout"):
        by_source: dict[str, list[str]] = {}
        for row in read_rows(work / "text" / f"{split}.jsonl"):
            by_source.setdefault(row["source"], []).append(row["text"])
        table: list[tuple[str, int, int, int]] = []
        arrays: list[npt.NDArray[np.uint16]] = []
        first = 0
        for source, texts in sorted(by_source.items()):
            ids = encode_documents(tokenizer, texts)
            size_bytes = sum(len(text.encode()) for text in texts)
            table.append((source, first, len(ids), size_bytes))
            arrays.append(ids)
            first += len(ids)
        np.concatenate(arrays).astype("<u2").tofile(target / f"{split}.bin")
        (target / f"{split}.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
        size_bytes = sum(row[3] for row in table)
        print(f"{split}: {first} tokens, {size_bytes} bytes, {size_bytes / first:.3f} per token")
