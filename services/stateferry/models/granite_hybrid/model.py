"""Granite 4 hybrid: embedding, a stack of (norm, Mamba-2 or attention, residual; norm, shared
SwiGLU + experts, residual), norm, head.

Granite multiplies what a block adds to the residual by one number m. The residual is kept divided
by m instead: it starts as embedding / m, blocks add their output as it is, and a norm of it is the
norm of the original when eps is divided by m^2.
"""

from __future__ import annotations

from pathlib import Path

import torch

from stateferry.models.granite_hybrid.config import GraniteHybridConfig
from stateferry.models.granite_hybrid.moe import granite_moe, shared_mlp
from stateferry.models.language_model import LanguageModel
from stateferry.models.layers.attention import Attention, attention
from stateferry.models.layers.block import Block, Layer
from stateferry.models.layers.mixer import Mamba2Mixer, gate_then_norm, mamba2_mixer
from stateferry.models.layers.rotary import RotaryTable
from stateferry.models.sizes import NO_KV
from stateferry.models.weights import Progress, WeightTable
from stateferry_kernels.operations import Kernels


def load_granite_hybrid(
    model_dir: Path,
    config: GraniteHybridConfig,
    table: WeightTable,
    kernels: Kernels,
    progress: Progress | None = None,
) -> LanguageModel:
    """Load a Hugging Face directory into an empty table. Raises ModelError."""
    d_model = config.d_model
    rotary = None if config.rotary is None else RotaryTable(config.rotary)
    mixers: list[Mamba2Mixer] = []
    attentions: list[Attention] = []

    def mixer(prefix: str, is_mamba: bool) -> Layer:
        if not is_mamba:
            name, index = f"{prefix}.self_attn", len(attentions)
            attentions.append(attention(table, name, index, d_model, config.attention, rotary))
            return attentions[-1]
        norm = gate_then_norm(table, f"{prefix}.mamba", config.mixer, kernels)
        mamba = mamba2_mixer(table, f"{prefix}.mamba", len(mixers), d_model, config.mixer, norm)
        mixers.append(mamba)
        return mamba

    def feed_forward(prefix: str) -> Layer:
        shared = shared_mlp(table, f"{prefix}.shared_mlp", d_model, config.shared_intermediate)
        if not config.moe.experts:
            return shared
        return granite_moe(table, f"{prefix}.block_sparse_moe", d_model, config.moe, shared)

    def norm(name: str) -> torch.Tensor:
        return table.whole(f"{name}.weight", (d_model,))

    blocks: list[Block] = []
    embedding = table.embedding("model.embed_tokens.weight", (config.vocab_size, d_model))
    for number, is_mamba in enumerate(config.mamba_layers):
        prefix = f"model.layers.{number}"
        blocks += [
            Block(norm(f"{prefix}.input_layernorm"), mixer(prefix, is_mamba)),
            Block(norm(f"{prefix}.post_attention_layernorm"), feed_forward(prefix)),
        ]
    final_norm = norm("model.norm")
    head = table.head("lm_head.weight", embedding, config.tie_embeddings)
    table.fill(model_dir, progress=progress)
    m = config.residual_multiplier
    return LanguageModel(
        config=config,
        kernels=kernels,
        vocab_size=config.vocab_size,
        dtype=table.dtype,
        chunk_size=config.chunk_size,
        state_geometry=config.mixer.state_geometry(len(mixers)),
        kv_geometry=config.attention.kv_geometry(len(attentions)) if attentions else NO_KV,
        embedding=embedding,
        embedding_scale=config.embedding_multiplier / m,
        residual_dtype=table.dtype,
        blocks=tuple(blocks),
        mixers=tuple(mamba.core for mamba in mixers),
        final_norm=final_norm,
        norm_eps=config.norm_eps / m**2,
        head=head.weight(),
        logit_scale=1.0 / config.logits_scaling,
    )
