"""Random hybrid models with a tokenizer, for what is not about the models themselves."""

from __future__ import annotations

from pathlib import Path

from support.hf_models import build
from support.tiny_model import EOS_ID, byte_tokenizer

CHUNK = 32

# Attention between other layers, without positions; and beside the mixer of every layer, rotary.
ARCHITECTURES = ("NemotronH", "FalconH1")


def write_tiny_hybrid(model_dir: Path, architecture: str = "NemotronH", seed: int = 0) -> Path:
    """Write config, tokenizer and weights; chunks of 32, the vocabulary is tiny_model's."""
    tokenizer = byte_tokenizer()
    model_dir.mkdir(parents=True, exist_ok=True)
    build(
        model_dir,
        architecture,
        seed=seed,
        vocab_size=tokenizer.get_vocab_size(),
        eos_token_id=EOS_ID,
    )
    tokenizer.save(str(model_dir / "tokenizer.json"))
    return model_dir
