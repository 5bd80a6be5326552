"""Random-weight Mamba-2 directories in Hugging Face layout, made without transformers."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

EOS_ID = 2


def write_tiny_model(
    model_dir: Path,
    *,
    seed: int = 0,
    hidden: int = 64,
    layers: int = 2,
    headdim: int = 16,
    dstate: int = 16,
    ngroups: int = 2,
    chunk_size: int = 32,
    tie: bool = True,
    bias: bool = False,
) -> Path:
    """Write config, tokenizer and weights; the vocabulary is three specials and all bytes."""
    model_dir.mkdir(parents=True, exist_ok=True)
    tokenizer = byte_tokenizer()
    tokenizer.save(str(model_dir / "tokenizer.json"))
    nheads, vocab = 2 * hidden // headdim, tokenizer.get_vocab_size()
    config = {
        "architectures": ["Mamba2ForCausalLM"],
        "model_type": "mamba2",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_heads": nheads,
        "head_dim": headdim,
        "state_size": dstate,
        "n_groups": ngroups,
        "expand": 2,
        "conv_kernel": 4,
        "chunk_size": chunk_size,
        "tie_word_embeddings": tie,
        "use_bias": bias,
        "use_conv_bias": True,
        "eos_token_id": EOS_ID,
    }
    (model_dir / "config.json").write_text(json.dumps(config), encoding="utf-8")
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float = 0.3) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * std

    inner, conv_dim = nheads * headdim, nheads * headdim + 2 * ngroups * dstate
    weights = {
        "backbone.embeddings.weight": normal(vocab, hidden, std=1.0),
        "backbone.norm_f.weight": torch.ones(hidden),
    }
    if not tie:
        weights["lm_head.weight"] = normal(vocab, hidden)
    for number in range(layers):
        prefix = f"backbone.layers.{number}."
        dt = torch.rand(nheads, generator=generator) * (math.log(0.1) - math.log(0.001))
        dt = torch.exp(dt + math.log(0.001))
        weights |= {
            prefix + "norm.weight": torch.ones(hidden),
            prefix + "mixer.in_proj.weight": normal(inner + conv_dim + nheads, hidden),
            prefix + "mixer.conv1d.weight": normal(conv_dim, 1, 4),
            prefix + "mixer.conv1d.bias": normal(conv_dim, std=0.1),
            prefix + "mixer.A_log": torch.log(torch.arange(1, nheads + 1).float()),
            prefix + "mixer.D": torch.ones(nheads),
            prefix + "mixer.dt_bias": dt + torch.log(-torch.expm1(-dt)),
            prefix + "mixer.norm.weight": torch.ones(inner),
            prefix + "mixer.out_proj.weight": normal(hidden, inner),
        }
        if bias:
            weights[prefix + "mixer.in_proj.bias"] = normal(inner + conv_dim + nheads, std=0.1)
            weights[prefix + "mixer.out_proj.bias"] = normal(hidden, std=0.1)
    save_file(weights, str(model_dir / "model.safetensors"), metadata={"format": "pt"})
    return model_dir


def byte_tokenizer() -> Tokenizer:
    """Three specials and all bytes."""
    vocab = {"<pad>": 0, "<s>": 1, "</s>": EOS_ID}
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocab[letter] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<pad>", "<s>", "</s>"])
    return tokenizer
