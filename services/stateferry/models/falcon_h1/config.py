"""The configuration of ``FalconH1ForCausalLM``."""

from __future__ import annotations

from dataclasses import dataclass

from stateferry.models.layers.rotary import RotaryOptions, rotary_options
from stateferry.models.options import (
    Raw,
    flag,
    integer,
    number,
    numbers,
    positive,
    require,
)
from stateferry.models.prefixed import attention_sizes, mixer_sizes
from stateferry.models.sizes import AttentionSizes, MixerSizes


@dataclass(frozen=True, slots=True)
class Multipliers:
    """What activations are multiplied by (Falcon-H1's forward multipliers)."""

    embedding: float
    logits: float
    attention_in: float
    attention_out: float
    key: float
    ssm_in: float
    ssm_out: float
    zxbcdt: tuple[float, ...]  # z, x, B, C, dt
    gate: float
    down: float


@dataclass(frozen=True, slots=True)
class FalconH1Config:
    vocab_size: int
    d_model: int
    num_layers: int
    mixer: MixerSizes
    norm_mixer: bool
    norm_before_gate: bool
    attention: AttentionSizes
    rotary: RotaryOptions
    intermediate: int
    mlp_bias: bool
    multipliers: Multipliers
    chunk_size: int
    norm_eps: float
    tie_embeddings: bool


def falcon_h1_config(raw: Raw) -> FalconH1Config:
    """Parse it. Raises ModelError naming the option we cannot serve."""
    require(raw, "hidden_act", ("silu", "swish"), default="silu")
    d_model = integer(raw, "hidden_size", 4096)
    norm_eps = positive(raw, "rms_norm_eps", 1e-5)
    # A file without it means expand * hidden_size only when it says null.
    expanded = int(positive(raw, "mamba_expand", 2) * d_model)
    d_inner = integer(raw, "mamba_d_ssm", expanded if "mamba_d_ssm" in raw else 1024)
    attention = attention_sizes(raw, d_model)
    gate, down = numbers(raw, "mlp_multipliers", 2)
    return FalconH1Config(
        vocab_size=integer(raw, "vocab_size", 128000),
        d_model=d_model,
        num_layers=integer(raw, "num_hidden_layers", 32),
        mixer=mixer_sizes(raw, d_inner, norm_eps, out_bias=flag(raw, "projectors_bias", False)),
        norm_mixer=flag(raw, "mamba_rms_norm", False),
        norm_before_gate=flag(raw, "mamba_norm_before_gate", True),
        attention=attention,
        rotary=rotary_options(raw, attention.head_dim),
        intermediate=integer(raw, "intermediate_size", 14336),
        mlp_bias=flag(raw, "mlp_bias", False),
        multipliers=Multipliers(
            embedding=number(raw, "embedding_multiplier", 1.0),
            logits=number(raw, "lm_head_multiplier", 1.0),
            attention_in=number(raw, "attention_in_multiplier", 1.0),
            attention_out=number(raw, "attention_out_multiplier", 1.0),
            key=number(raw, "key_multiplier", 1.0),
            ssm_in=number(raw, "ssm_in_multiplier", 1.0),
            ssm_out=number(raw, "ssm_out_multiplier", 1.0),
            zxbcdt=numbers(raw, "ssm_multipliers", 5),
            gate=gate,
            down=down,
        ),
        chunk_size=integer(raw, "mamba_chunk_size", 256),
        norm_eps=norm_eps,
        tie_embeddings=flag(raw, "tie_word_embeddings", False),
    )
