"""The configuration of ``GraniteMoeHybridForCausalLM``."""

from __future__ import annotations

from dataclasses import dataclass

from stateferry.core.errors import ModelError
from stateferry.models.layers.rotary import RotaryOptions, rotary_options
from stateferry.models.options import Raw, flag, integer, number, positive, require
from stateferry.models.prefixed import attention_sizes, mixer_sizes
from stateferry.models.sizes import AttentionSizes, MixerSizes

# Whether a layer of that name is a Mamba-2 mixer; otherwise it is attention.
_KINDS = {"linear_attention": True, "mamba": True, "full_attention": False, "attention": False}


@dataclass(frozen=True, slots=True)
class MoeSizes:
    """Routed experts; none in a dense model."""

    experts: int
    top_k: int
    intermediate: int


@dataclass(frozen=True, slots=True)
class GraniteHybridConfig:
    vocab_size: int
    d_model: int
    mamba_layers: tuple[bool, ...]  # per layer: a mixer, or attention
    mixer: MixerSizes
    attention: AttentionSizes
    rotary: RotaryOptions | None
    moe: MoeSizes
    shared_intermediate: int
    embedding_multiplier: float
    residual_multiplier: float
    logits_scaling: float
    chunk_size: int
    norm_eps: float
    tie_embeddings: bool


def granite_hybrid_config(raw: Raw) -> GraniteHybridConfig:
    """Parse it. Raises ModelError naming the option we cannot serve."""
    require(raw, "hidden_act", ("silu", "swish"), default="silu")
    d_model = integer(raw, "hidden_size", 4096)
    norm_eps = positive(raw, "rms_norm_eps", 1e-6)
    d_inner = int(positive(raw, "mamba_expand", 2) * d_model)
    bias = flag(raw, "mamba_proj_bias", False)
    scale = number(raw, "attention_multiplier", 1.0)
    attention = attention_sizes(raw, d_model, kv_heads=None, scale=scale)
    # The published models say nope: no position embedding.
    positions = require(raw, "position_embedding_type", ("rope", "nope", None), default=None)
    return GraniteHybridConfig(
        vocab_size=integer(raw, "vocab_size", 32000),
        d_model=d_model,
        mamba_layers=_mamba_layers(raw),
        mixer=mixer_sizes(raw, d_inner, norm_eps, out_bias=bias),
        attention=attention,
        rotary=rotary_options(raw, attention.head_dim) if positions == "rope" else None,
        moe=_moe(raw),
        shared_intermediate=integer(raw, "shared_intermediate_size", 1024),
        embedding_multiplier=number(raw, "embedding_multiplier", 1.0),
        residual_multiplier=positive(raw, "residual_multiplier", 1.0),
        logits_scaling=positive(raw, "logits_scaling", 1.0),
        chunk_size=integer(raw, "mamba_chunk_size", 256),
        norm_eps=norm_eps,
        tie_embeddings=flag(raw, "tie_word_embeddings", False),
    )


def _mamba_layers(raw: Raw) -> tuple[bool, ...]:
    """``layer_types``, by default all mixers."""
    count = integer(raw, "num_hidden_layers", 32)
    names = raw.get("layer_types", raw.get("layers_block_type"))
    names = ["mamba"] * count if names is None else names
    if not isinstance(names, list) or len(names) != count:
        raise ModelError(f"layer_types = {names!r} is not a list of {count} layers")
    for name in names:
        if name not in _KINDS:
            supported = ", ".join(_KINDS)
            raise ModelError(f"layer_types: {name!r} is not supported; supported: {supported}")
    return tuple(_KINDS[name] for name in names)


def _moe(raw: Raw) -> MoeSizes:
    experts = integer(raw, "num_local_experts", 8, least=0)
    top_k = integer(raw, "num_experts_per_tok", 2, least=0)
    if experts and not 0 < top_k <= experts:
        raise ModelError(f"num_experts_per_tok {top_k} does not fit {experts} experts")
    return MoeSizes(experts, top_k, integer(raw, "intermediate_size", 11008))
