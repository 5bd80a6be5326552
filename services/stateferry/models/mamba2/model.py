"""Mamba-2: embedding, a stack of (norm, mixer, residual), norm, head."""

from __future__ import annotations

from pathlib import Path

import torch

from stateferry.models.language_model import LanguageModel
from stateferry.models.layers.block import Block
from stateferry.models.layers.mixer import Mamba2Mixer, gate_then_norm, mamba2_mixer
from stateferry.models.mamba2.config import Mamba2Config
from stateferry.models.sizes import NO_KV
from stateferry.models.weights import Progress, WeightTable
from stateferry_kernels.operations import Kernels

# Early conversions of the authors' own checkpoints.
_RENAMES = ((r"\bembedding\.weight$", "embeddings.weight"),)


def load_mamba2(
    model_dir: Path,
    config: Mamba2Config,
    table: WeightTable,
    kernels: Kernels,
    progress: Progress | None = None,
) -> LanguageModel:
    """Load a Hugging Face directory into an empty table. Raises ModelError."""
    d_model = config.d_model

    def layer(number: int) -> tuple[torch.Tensor, Mamba2Mixer]:
        prefix = f"backbone.layers.{number}"
        mixer = f"{prefix}.mixer"
        norm = gate_then_norm(table, mixer, config.mixer, kernels)
        return (
            table.whole(f"{prefix}.norm.weight", (d_model,)),
            mamba2_mixer(table, mixer, number, d_model, config.mixer, norm),
        )

    embedding = table.embedding("backbone.embeddings.weight", (config.vocab_size, d_model))
    layers = [layer(number) for number in range(config.num_layers)]
    final_norm = table.whole("backbone.norm_f.weight", (d_model,))
    head = table.head("lm_head.weight", embedding, config.tie_embeddings)
    table.fill(model_dir, renames=_RENAMES, progress=progress)
    return LanguageModel(
        config=config,
        kernels=kernels,
        vocab_size=config.vocab_size,
        dtype=table.dtype,
        chunk_size=config.chunk_size,
        state_geometry=config.mixer.state_geometry(config.num_layers),
        kv_geometry=NO_KV,
        embedding=embedding,
        embedding_scale=1.0,
        residual_dtype=torch.float32 if config.residual_in_fp32 else table.dtype,
        blocks=tuple(Block(norm, mixer) for norm, mixer in layers),
        mixers=tuple(mixer.core for _, mixer in layers),
        final_norm=final_norm,
        norm_eps=config.norm_eps,
        head=head.weight(),
        logit_scale=1.0,
    )
