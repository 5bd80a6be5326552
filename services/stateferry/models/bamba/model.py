"""Bamba: embedding, a stack of (norm, Mamba-2 or attention, residual; norm, SwiGLU, residual),
norm, head."""

from __future__ import annotations

from pathlib import Path

import torch

from stateferry.models.bamba.config import BambaConfig
from stateferry.models.language_model import LanguageModel
from stateferry.models.layers.attention import Attention, attention
from stateferry.models.layers.block import Block, Layer
from stateferry.models.layers.mixer import Mamba2Mixer, gate_then_norm, mamba2_mixer
from stateferry.models.layers.mlp import gated_mlp
from stateferry.models.layers.rotary import RotaryTable
from stateferry.models.sizes import NO_KV
from stateferry.models.weights import Progress, WeightTable
from stateferry_kernels.operations import Kernels


def load_bamba(
    model_dir: Path,
    config: BambaConfig,
    table: WeightTable,
    kernels: Kernels,
    progress: Progress | None = None,
) -> LanguageModel:
    """Load a Hugging Face directory into an empty table. Raises ModelError."""
    d_model = config.d_model
    rotary = RotaryTable(config.rotary)
    mixers: list[Mamba2Mixer] = []
    attentions: list[Attention] = []

    def mixer(number: int) -> Layer:
        if number in config.attention_layers:
            prefix, index = f"model.layers.{number}.self_attn", len(attentions)
            attentions.append(attention(table, prefix, index, d_model, config.attention, rotary))
            return attentions[-1]
        prefix = f"model.layers.{number}.mamba"
        norm = gate_then_norm(table, prefix, config.mixer, kernels)
        mixers.append(mamba2_mixer(table, prefix, len(mixers), d_model, config.mixer, norm))
        return mixers[-1]

    def norm(name: str) -> torch.Tensor:
        return table.whole(f"model.{name}.weight", (d_model,))

    blocks: list[Block] = []
    embedding = table.embedding("model.embed_tokens.weight", (config.vocab_size, d_model))
    for number in range(config.num_layers):
        feed_forward = f"model.layers.{number}.feed_forward"
        mlp = gated_mlp(table, feed_forward, d_model, config.intermediate, config.mlp_bias)
        blocks += [
            Block(norm(f"layers.{number}.input_layernorm"), mixer(number)),
            Block(norm(f"layers.{number}.pre_ff_layernorm"), mlp),
        ]
    final_norm = norm("final_layernorm")
    head = table.head("lm_head.weight", embedding, config.tie_embeddings)
    table.fill(model_dir, progress=progress)
    return LanguageModel(
        config=config,
        kernels=kernels,
        vocab_size=config.vocab_size,
        dtype=table.dtype,
        chunk_size=config.chunk_size,
        state_geometry=config.mixer.state_geometry(len(mixers)),
        kv_geometry=config.attention.kv_geometry(len(attentions)) if attentions else NO_KV,
        embedding=embedding,
        embedding_scale=1.0,
        residual_dtype=table.dtype,
        blocks=tuple(blocks),
        mixers=tuple(m.core for m in mixers),
        final_norm=final_norm,
        norm_eps=config.norm_eps,
        head=head.weight(),
        logit_scale=1.0,
    )
