"""Falcon-H1: embedding, a stack of (norm, Mamba-2 + attention, residual; norm, SwiGLU, residual),
norm, head."""

from __future__ import annotations

from pathlib import Path

from stateferry.models.falcon_h1.config import FalconH1Config
from stateferry.models.falcon_h1.parallel import ParallelMixer, parallel_mixer
from stateferry.models.language_model import LanguageModel
from stateferry.models.layers.attention import AttentionCore
from stateferry.models.layers.block import Block
from stateferry.models.layers.mixer import (
    GateAndNorm,
    gate_then_norm,
    mixer_core,
    norm_then_gate,
)
from stateferry.models.layers.mlp import gated_mlp
from stateferry.models.layers.rotary import RotaryTable
from stateferry.models.weights import Progress, WeightTable
from stateferry_kernels.operations import Kernels


def load_falcon_h1(
    model_dir: Path,
    config: FalconH1Config,
    table: WeightTable,
    kernels: Kernels,
    progress: Progress | None = None,
) -> LanguageModel:
    """Load a Hugging Face directory into an empty table. Raises ModelError."""
    d_model, by = config.d_model, config.multipliers
    rotary = RotaryTable(config.rotary)
    mixers: list[ParallelMixer] = []
    blocks: list[Block] = []
    embedding = table.embedding("model.embed_tokens.weight", (config.vocab_size, d_model))
    for number in range(config.num_layers):
        prefix = f"model.layers.{number}"
        norm = _mixer_norm(table, f"{prefix}.mamba", config, kernels)
        mamba = mixer_core(table, f"{prefix}.mamba", number, config.mixer, norm)
        heads = AttentionCore(config.attention, number, rotary)
        mixers.append(parallel_mixer(table, prefix, config, mamba, heads))
        mlp = gated_mlp(
            table,
            f"{prefix}.feed_forward",
            d_model,
            config.intermediate,
            config.mlp_bias,
            gate_scale=by.gate,
            down_scale=by.down,
        )
        blocks += [
            Block(table.whole(f"{prefix}.input_layernorm.weight", (d_model,)), mixers[-1]),
            Block(table.whole(f"{prefix}.pre_ff_layernorm.weight", (d_model,)), mlp),
        ]
    final_norm = table.whole("model.final_layernorm.weight", (d_model,))
    head = table.head("lm_head.weight", embedding, config.tie_embeddings)
    table.fill(model_dir, progress=progress)
    return LanguageModel(
        config=config,
        kernels=kernels,
        vocab_size=config.vocab_size,
        dtype=table.dtype,
        chunk_size=config.chunk_size,
        state_geometry=config.mixer.state_geometry(config.num_layers),
        kv_geometry=config.attention.kv_geometry(config.num_layers),
        embedding=embedding,
        embedding_scale=by.embedding,
        residual_dtype=table.dtype,
        blocks=tuple(blocks),
        mixers=tuple(mixer.mamba for mixer in mixers),
        final_norm=final_norm,
        norm_eps=config.norm_eps,
        head=head.weight(),
        logit_scale=by.logits,
    )


def _mixer_norm(
    table: WeightTable, prefix: str, config: FalconH1Config, kernels: Kernels
) -> GateAndNorm | None:
    if not config.norm_mixer:
        return None
    declare = norm_then_gate if config.norm_before_gate else gate_then_norm
    return declare(table, prefix, config.mixer, kernels)
