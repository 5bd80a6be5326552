"""The configuration of ``Mamba2ForCausalLM``."""

from __future__ import annotations

from dataclasses import dataclass

from stateferry.core.errors import ModelError
from stateferry.models.options import Raw, flag, integer, positive, require, time_step_limit
from stateferry.models.sizes import MixerSizes


@dataclass(frozen=True, slots=True)
class Mamba2Config:
    """A pure Mamba-2 language model."""

    vocab_size: int
    d_model: int
    num_layers: int
    mixer: MixerSizes
    chunk_size: int
    norm_eps: float
    tie_embeddings: bool
    residual_in_fp32: bool


def mamba2_config(raw: Raw) -> Mamba2Config:
    """Parse it. Raises ModelError naming the option we cannot serve.

    ``norm_before_gate`` is ignored, as transformers does. Its first release wrote ``true`` by
    default, for weights that were trained with the gate first (its pull request 32686).
    """
    require(raw, "hidden_act", ("silu", "swish"), default="silu")
    require(raw, "rms_norm", (True,), default=True)
    d_model = integer(raw, "hidden_size", 4096)
    headdim = integer(raw, "head_dim", 64)
    nheads = integer(raw, "num_heads", 128)
    expand = positive(raw, "expand", 2)
    if expand * d_model != nheads * headdim:
        raise ModelError(
            f"num_heads {nheads} * head_dim {headdim} is not "
            f"expand {expand:g} * hidden_size {d_model}"
        )
    norm_eps = positive(raw, "layer_norm_epsilon", 1e-5)
    bias = flag(raw, "use_bias", False)
    return Mamba2Config(
        vocab_size=integer(raw, "vocab_size", 32768),
        d_model=d_model,
        num_layers=integer(raw, "num_hidden_layers", 64),
        mixer=MixerSizes(
            nheads=nheads,
            headdim=headdim,
            dstate=integer(raw, "state_size", 128),
            ngroups=integer(raw, "n_groups", 8),
            d_conv=integer(raw, "conv_kernel", 4),
            dt_limit=time_step_limit(raw),
            in_bias=bias,
            out_bias=bias,
            conv_bias=flag(raw, "use_conv_bias", True),
            norm_eps=norm_eps,
        ),
        chunk_size=integer(raw, "chunk_size", 256),
        norm_eps=norm_eps,
        tie_embeddings=flag(raw, "tie_word_embeddings", False),
        residual_in_fp32=flag(raw, "residual_in_fp32", True),
    )
