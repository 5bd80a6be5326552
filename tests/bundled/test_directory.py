"""The shipped model directory: complete, small, loadable, and as good as its report says."""

from __future__ import annotations

import json
import lzma
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

import stateferry.bundled
from stateferry.bundled import bundled_model_dir

ARCHITECTURES = {"hybrid_english": "NemotronHForCausalLM", "mamba2_english": "Mamba2ForCausalLM"}
SAMPLE = Path(stateferry.bundled.__file__).parent / "heldout_sample.txt"
SAMPLE_PART_BYTES = 24_000
ODD_STRINGS = (
    "",
    " ",
    "\n\n \t\r\n",
    "plain English, with punctuation; and 12345 numbers.",
    "naïve café — “quotes” …",
    "日本語のテキスト, русский, العربية",
    "emoji 👩‍👩‍👧‍👦 and flags 🇸🇪",
    "nul \x00 and other controls \x01\x1f\x7f\x85",
    "combining e\u0301 is not \u00e9",
    "    indented\n\tcode(x_y) -> {z: [1, 2]}",
    "\u200b\ufeff\U0010ffff",
    "a" * 300,
)


@pytest.fixture(scope="module", params=list(ARCHITECTURES))
def model_dir(request: pytest.FixtureRequest) -> Path:
    return bundled_model_dir(request.param)


@pytest.fixture(scope="module")
def tokenizer(model_dir: Path) -> Tokenizer:
    return Tokenizer.from_file(str(model_dir / "tokenizer.json"))


def test_a_hybrid_is_the_default() -> None:
    assert bundled_model_dir() == bundled_model_dir("hybrid_english")


def test_files_are_present_and_small(model_dir: Path) -> None:
    for name in (
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "evaluation.json",
        "README.md",
        "SOURCES.md",
    ):
        assert (model_dir / name).stat().st_size > 0, name
    assert (model_dir / "model.safetensors").stat().st_size <= 12_000_000
    assert SAMPLE.stat().st_size <= 64 * 1024


def test_unknown_name_lists_what_there_is() -> None:
    with pytest.raises(
        ValueError, match=r"no_such_model.*available: hybrid_english, mamba2_english"
    ):
        bundled_model_dir("no_such_model")


@pytest.mark.parametrize("text", ODD_STRINGS)
def test_tokenizer_is_lossless(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_tokenizer_agrees_with_the_config(model_dir: Path, tokenizer: Tokenizer) -> None:
    config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    assert tokenizer.get_vocab_size() == config["vocab_size"]
    assert tokenizer.token_to_id("<|endoftext|>") == config["eos_token_id"]
    assert config["bos_token_id"] == config["eos_token_id"]


def test_weights_are_finite_bfloat16(model_dir: Path) -> None:
    weights = load_file(model_dir / "model.safetensors")
    assert "backbone.embeddings.weight" in weights
    for name, tensor in weights.items():
        assert tensor.dtype == torch.bfloat16, name
        assert torch.isfinite(tensor).all(), name


def sample_documents() -> list[str]:
    """Held-out documents up to about 24 KB, enough to tell a working model from a broken one."""
    chosen: list[str] = []
    size = 0
    for text in SAMPLE.read_text(encoding="utf-8").split("\f"):
        if size + len(text.encode()) <= SAMPLE_PART_BYTES:
            chosen.append(text)
            size += len(text.encode())
    return chosen


@pytest.mark.filterwarnings("ignore")
def test_transformers_loads_it_and_it_predicts_english(
    model_dir: Path, tokenizer: Tokenizer
) -> None:
    transformers = pytest.importorskip("transformers")
    model: Any
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert type(model).__name__ == ARCHITECTURES[model_dir.name]
    theirs = transformers.AutoTokenizer.from_pretrained(model_dir)
    assert theirs("Hello there.")["input_ids"] == tokenizer.encode("Hello there.").ids

    documents = sample_documents()
    size_bytes = sum(len(text.encode()) for text in documents)
    bits = 0.0
    with torch.no_grad():
        for text in documents:
            ids = torch.tensor([[0, *tokenizer.encode(text).ids, 0]])
            logits = model(ids[:, :-1]).logits[0]
            loss = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
            bits += float(loss) / math.log(2)
    packed_bytes = len(lzma.compress("\n\n".join(documents).encode(), preset=9))
    report = json.loads((model_dir / "evaluation.json").read_text(encoding="utf-8"))
    assert size_bytes > 15_000
    assert bits < 0.6 * 8 * packed_bytes
    assert bits / size_bytes < report["sample_bits_per_byte"] + 0.1
