"""The configuration of ``BambaForCausalLM``."""

from __future__ import annotations

from dataclasses import dataclass

from stateferry.core.errors import ModelError
from stateferry.models.layers.rotary import RotaryOptions, rotary_options
from stateferry.models.options import Raw, flag, integer, positive, require
from stateferry.models.prefixed import attention_sizes, mixer_sizes
from stateferry.models.sizes import AttentionSizes, MixerSizes


@dataclass(frozen=True, slots=True)
class BambaConfig:
    vocab_size: int
    d_model: int
    num_layers: int
    attention_layers: frozenset[int]
    mixer: MixerSizes
    attention: AttentionSizes
    rotary: RotaryOptions
    intermediate: int
    mlp_bias: bool
    chunk_size: int
    norm_eps: float
    tie_embeddings: bool


def bamba_config(raw: Raw) -> BambaConfig:
    """Parse it. Raises ModelError naming the option we cannot serve."""
    require(raw, "hidden_act", ("silu", "swish"), default="silu")
    d_model = integer(raw, "hidden_size", 4096)
    norm_eps = positive(raw, "rms_norm_eps", 1e-5)
    d_inner = int(positive(raw, "mamba_expand", 2) * d_model)
    bias = flag(raw, "mamba_proj_bias", False)
    attention = attention_sizes(raw, d_model)
    num_layers = integer(raw, "num_hidden_layers", 32)
    return BambaConfig(
        vocab_size=integer(raw, "vocab_size", 128000),
        d_model=d_model,
        num_layers=num_layers,
        attention_layers=_attention_layers(raw, num_layers),
        mixer=mixer_sizes(raw, d_inner, norm_eps, out_bias=bias),
        attention=attention,
        rotary=rotary_options(raw, attention.head_dim, default_share=0.5),
        intermediate=integer(raw, "intermediate_size", 14336),
        mlp_bias=flag(raw, "mlp_bias", False),
        chunk_size=integer(raw, "mamba_chunk_size", 256),
        norm_eps=norm_eps,
        tie_embeddings=flag(raw, "tie_word_embeddings", False),
    )


def _attention_layers(raw: Raw, num_layers: int) -> frozenset[int]:
    indices = raw.get("attn_layer_indices") or []
    fine = isinstance(indices, list) and all(
        isinstance(index, int) and 0 <= index < num_layers for index in indices
    )
    if not fine:
        raise ModelError(f"attn_layer_indices = {indices!r} is not a list of layers")
    return frozenset(indices)
