"""Checkpoints of random weights, written by transformers: what everybody here loads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

TINY_MODELS = ("mamba2-tiny", "nemotron_h-tiny")


@dataclass(frozen=True)
class _Size:
    hidden: int
    layers: int
    vocab: int
    state: int
    head: int
    chunk: int


_SIZES = {
    "tiny": _Size(hidden=64, layers=4, vocab=300, state=16, head=16, chunk=32),
    "small": _Size(hidden=768, layers=24, vocab=32000, state=128, head=64, chunk=256),
}
_SPECIAL = ("<pad>", "<s>", "</s>")
# Of a NemotronH, repeated until all layers have one.
_BLOCKS = ("linear_attention", "mlp", "linear_attention", "mlp")
_BLOCKS += ("full_attention", "mlp", "linear_attention", "mlp")


def find_or_make(name: str, folder: Path) -> Path:
    """``folder/name``, written first if it is not there. Raises ValueError for an unknown name."""
    path = folder / name
    if not (path / "config.json").is_file():
        family, _, size = name.rpartition("-")
        if size not in _SIZES or family not in _FAMILIES:
            raise ValueError(f"--models {name!r}: {folder} has none, and it is not one we can make")
        _write(family, _SIZES[size], path)
    return path


def _write(family: str, size: _Size, path: Path) -> None:
    # A second or more to import: only for those who need it.
    import torch

    torch.manual_seed(0)
    model = _FAMILIES[family](size).eval()
    # Random models do not know an end.
    model.generation_config.eos_token_id = _SPECIAL.index("</s>")
    model.to(torch.bfloat16).save_pretrained(path)
    _tokenizer().save_pretrained(path)


def _mamba2(size: _Size) -> Any:
    import transformers

    config = transformers.Mamba2Config(
        **_common(size),
        state_size=size.state,
        num_hidden_layers=size.layers,
        num_heads=2 * size.hidden // size.head,
        head_dim=size.head,
        expand=2,
        n_groups=1,
        tie_word_embeddings=True,
        residual_in_fp32=False,
        initializer_range=0.02,
    )
    return transformers.Mamba2ForCausalLM(config)


def _nemotron_h(size: _Size) -> Any:
    import transformers

    config = transformers.NemotronHConfig(
        **_common(size),
        layers_block_type=list(_BLOCKS) * max(1, size.layers // len(_BLOCKS)),
        num_attention_heads=max(2, size.hidden // 64),
        num_key_value_heads=max(1, size.hidden // 192),
        head_dim=64,
        max_position_embeddings=8192,
        intermediate_size=3 * size.hidden,
        ssm_state_size=size.state,
        mamba_num_heads=2 * size.hidden // size.head,
        mamba_head_dim=size.head,
        expand=2,
        n_groups=1,
        tie_word_embeddings=False,
    )
    return transformers.NemotronHForCausalLM(config)


def _common(size: _Size) -> dict[str, Any]:
    ids = {f"{name}_token_id": number for number, name in enumerate(("pad", "bos", "eos"))}
    return {
        "vocab_size": size.vocab,
        "hidden_size": size.hidden,
        "chunk_size": size.chunk,
        **ids,
    }


def _tokenizer() -> Any:
    """One token per byte; whoever loads a directory wants one to be there."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = [*_SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    pad, bos, eos = _SPECIAL
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, bos_token=bos, eos_token=eos
    )


_FAMILIES = {"mamba2": _mamba2, "nemotron_h": _nemotron_h}
