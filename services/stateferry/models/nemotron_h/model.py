"""Nemotron-H: embedding, a stack of (norm, layer, residual), norm, head.

layer:  Mamba-2 mixer | attention without positions | relu^2 MLP | mixture of relu^2 experts
"""

from __future__ import annotations

from pathlib import Path

import torch

from stateferry.models.language_model import LanguageModel
from stateferry.models.layers.attention import attention
from stateferry.models.layers.block import Block, Layer
from stateferry.models.layers.mixer import Mamba2Mixer, gate_then_norm, mamba2_mixer
from stateferry.models.layers.mlp import relu2_mlp
from stateferry.models.nemotron_h.config import LayerKind, NemotronHConfig
from stateferry.models.nemotron_h.moe import nemotron_moe
from stateferry.models.sizes import NO_KV
from stateferry.models.weights import Progress, WeightTable
from stateferry_kernels.operations import Kernels

_FP32 = torch.float32
# Files say backbone, the library's own modules say model.
_RENAMES = ((r"^model\.", "backbone."),)
# Layers that draft further tokens; the backbone does not read them.
_IGNORED = (r"^mtp\.",)


def load_nemotron_h(
    model_dir: Path,
    config: NemotronHConfig,
    table: WeightTable,
    kernels: Kernels,
    progress: Progress | None = None,
) -> LanguageModel:
    """Load a Hugging Face directory into an empty table. Raises ModelError."""
    d_model = config.d_model
    mixers: list[Mamba2Mixer] = []

    def layer(number: int, kind: LayerKind) -> Layer:
        prefix = f"backbone.layers.{number}.mixer"
        if kind is LayerKind.MAMBA:
            norm = gate_then_norm(table, prefix, config.mixer, kernels)
            mixers.append(mamba2_mixer(table, prefix, len(mixers), d_model, config.mixer, norm))
            return mixers[-1]
        if kind is LayerKind.ATTENTION:
            index = config.kinds[:number].count(LayerKind.ATTENTION)
            return attention(table, prefix, index, d_model, config.attention, None)
        if kind is LayerKind.MLP:
            return relu2_mlp(table, prefix, d_model, config.mlp.intermediate, config.mlp.bias)
        assert config.moe is not None
        return nemotron_moe(table, prefix, d_model, config.moe)

    embedding = table.embedding("backbone.embeddings.weight", (config.vocab_size, d_model))
    blocks = [
        Block(
            table.whole(f"backbone.layers.{number}.norm.weight", (d_model,), dtype=_FP32),
            layer(number, kind),
        )
        for number, kind in enumerate(config.kinds)
    ]
    final_norm = table.whole("backbone.norm_f.weight", (d_model,), dtype=_FP32)
    head = table.head("lm_head.weight", embedding, config.tie_embeddings)
    table.fill(model_dir, renames=_RENAMES, ignored=_IGNORED, progress=progress)
    attentions = config.kinds.count(LayerKind.ATTENTION)
    return LanguageModel(
        config=config,
        kernels=kernels,
        vocab_size=config.vocab_size,
        dtype=table.dtype,
        chunk_size=config.chunk_size,
        state_geometry=config.mixer.state_geometry(len(mixers)),
        kv_geometry=config.attention.kv_geometry(attentions) if attentions else NO_KV,
        embedding=embedding,
        embedding_scale=1.0,
        residual_dtype=_FP32 if config.residual_in_fp32 else table.dtype,
        blocks=tuple(blocks),
        mixers=tuple(mixer.core for mixer in mixers),
        final_norm=final_norm,
        norm_eps=config.norm_eps,
        head=head.weight(),
        logit_scale=1.0,
    )
