"""The configuration of ``NemotronHForCausalLM``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

from stateferry.core.errors import ModelError
from stateferry.models.options import Raw, flag, integer, number, positive, require
from stateferry.models.sizes import AttentionSizes, MixerSizes


class LayerKind(Enum):
    """The value is the letter of ``hybrid_override_pattern``."""

    MAMBA = "M"
    ATTENTION = "*"
    MLP = "-"
    MOE = "E"


@dataclass(frozen=True, slots=True)
class MlpSizes:
    intermediate: int
    bias: bool


@dataclass(frozen=True, slots=True)
class MoeSizes:
    """Routed experts that work in ``width`` features, and one that sees every token."""

    experts: int
    top_k: int
    num_groups: int
    top_groups: int
    normalize: bool
    scale: float
    width: int
    intermediate: int
    shared_intermediate: int
    bias: bool


@dataclass(frozen=True, slots=True)
class NemotronHConfig:
    """One mixer per layer, of the kind that ``kinds`` says."""

    vocab_size: int
    d_model: int
    kinds: tuple[LayerKind, ...]
    mixer: MixerSizes
    attention: AttentionSizes
    mlp: MlpSizes
    moe: MoeSizes | None  # where there are experts
    chunk_size: int
    norm_eps: float
    tie_embeddings: bool
    residual_in_fp32: bool


_NAMES = {
    "linear_attention": LayerKind.MAMBA,
    "mamba": LayerKind.MAMBA,
    "full_attention": LayerKind.ATTENTION,
    "attention": LayerKind.ATTENTION,
    "mlp": LayerKind.MLP,
    "moe": LayerKind.MOE,
}


def nemotron_h_config(raw: Raw) -> NemotronHConfig:
    """Parse it. Raises ModelError naming the option we cannot serve."""
    require(raw, "mamba_hidden_act", ("silu", "swish"), default="silu")
    require(raw, "mlp_hidden_act", ("relu2",), default="relu2")
    require(raw, "attention_bias", (False,), default=False)
    require(raw, "sliding_window", (None,), default=None)
    d_model, kinds = integer(raw, "hidden_size", 4096), _kinds(raw)
    return NemotronHConfig(
        vocab_size=integer(raw, "vocab_size", 131072),
        d_model=d_model,
        kinds=kinds,
        mixer=_mixer(raw),
        attention=_attention(raw),
        mlp=MlpSizes(integer(raw, "intermediate_size", 21504), flag(raw, "mlp_bias", False)),
        moe=_moe(raw, d_model) if LayerKind.MOE in kinds else None,
        chunk_size=integer(raw, "chunk_size", integer(raw, "mamba_chunk_size", 128)),
        norm_eps=positive(raw, "layer_norm_epsilon", 1e-5),
        tie_embeddings=flag(raw, "tie_word_embeddings", False),
        residual_in_fp32=flag(raw, "residual_in_fp32", False),
    )


def _kinds(raw: Raw) -> tuple[LayerKind, ...]:
    """``layers_block_type`` of newer files, or the string of older ones."""
    letters = {kind.value: kind for kind in LayerKind}
    for option, names in (
        ("layers_block_type", _NAMES),
        ("layer_types", _NAMES),
        ("hybrid_override_pattern", letters),
    ):
        pattern = raw.get(option)
        if pattern is None:
            continue
        if not isinstance(pattern, list | str) or not pattern:
            raise ModelError(f"{option} = {pattern!r} is not a pattern of layers")
        for name in pattern:
            if name not in names:
                supported = ", ".join(names)
                raise ModelError(f"{option}: {name!r} is not supported; supported: {supported}")
        return tuple(names[name] for name in pattern)
    raise ModelError("layers_block_type is missing")


def _mixer(raw: Raw) -> MixerSizes:
    bias = flag(raw, "use_bias", False)
    return MixerSizes(
        nheads=integer(raw, "mamba_num_heads", 128),
        headdim=integer(raw, "mamba_head_dim", 64),
        dstate=integer(raw, "ssm_state_size", 128),
        ngroups=integer(raw, "n_groups", integer(raw, "mamba_n_groups", 8)),
        d_conv=integer(raw, "conv_kernel", integer(raw, "mamba_d_conv", 4)),
        # Not time_step_limit, which transformers reads and does not use here.
        dt_limit=(number(raw, "time_step_min", number(raw, "mamba_dt_min", 0.001)), math.inf),
        in_bias=bias,
        out_bias=bias,
        conv_bias=flag(raw, "use_conv_bias", flag(raw, "mamba_conv_bias", True)),
        norm_eps=positive(raw, "layer_norm_epsilon", 1e-5),
    )


def _attention(raw: Raw) -> AttentionSizes:
    heads = integer(raw, "num_attention_heads", 32)
    # Older files call it attention_head_dim.
    head_dim = integer(raw, "head_dim", integer(raw, "attention_head_dim", 128))
    return AttentionSizes(
        heads=heads,
        # null, in older files, means one for every head.
        kv_heads=integer(raw, "num_key_value_heads", heads if "num_key_value_heads" in raw else 8),
        head_dim=head_dim,
        scale=head_dim**-0.5,
        bias=False,
    )


def _moe(raw: Raw, d_model: int) -> MoeSizes:
    moe = MoeSizes(
        experts=integer(raw, "n_routed_experts", 8),
        top_k=integer(raw, "num_experts_per_tok", 2),
        num_groups=integer(raw, "n_group", 1),
        top_groups=integer(raw, "topk_group", 1),
        normalize=flag(raw, "norm_topk_prob", True),
        scale=number(raw, "routed_scaling_factor", 1.0),
        width=integer(raw, "moe_latent_size", d_model),
        intermediate=integer(raw, "moe_intermediate_size", 7688),
        shared_intermediate=integer(raw, "moe_shared_expert_intermediate_size", 7688),
        bias=flag(raw, "mlp_bias", False),
    )
    per_group, rest = divmod(moe.experts, moe.num_groups)
    if rest or (moe.top_groups < moe.num_groups and per_group < 2):
        raise ModelError(f"n_group {moe.num_groups} does not fit {moe.experts} routed experts")
    if moe.top_groups > moe.num_groups:
        raise ModelError(f"topk_group {moe.top_groups} is more than n_group {moe.num_groups}")
    if moe.top_k > moe.top_groups * per_group:
        raise ModelError(f"num_experts_per_tok {moe.top_k} is more than there are experts")
    return moe
