"""Options that Falcon-H1, Granite and Bamba spell alike: ``mamba_`` before those of the mixer."""

from __future__ import annotations

from stateferry.core.errors import ModelError
from stateferry.models.options import Raw, flag, integer, time_step_limit
from stateferry.models.sizes import AttentionSizes, MixerSizes


def mixer_sizes(raw: Raw, d_inner: int, norm_eps: float, *, out_bias: bool) -> MixerSizes:
    """The mixer of ``d_inner`` features. Raises ModelError when heads do not make that many."""
    nheads = integer(raw, "mamba_n_heads", 128)
    automatic = raw.get("mamba_d_head", "auto") == "auto"
    headdim = d_inner // nheads if automatic else integer(raw, "mamba_d_head")
    if nheads * headdim != d_inner:
        raise ModelError(
            f"mamba_n_heads {nheads} * mamba_d_head {headdim} is not the mixer's {d_inner} features"
        )
    return MixerSizes(
        nheads=nheads,
        headdim=headdim,
        dstate=integer(raw, "mamba_d_state", 256),
        ngroups=integer(raw, "mamba_n_groups", 1),
        d_conv=integer(raw, "mamba_d_conv", 4),
        dt_limit=time_step_limit(raw),
        in_bias=flag(raw, "mamba_proj_bias", False),
        out_bias=out_bias,
        conv_bias=flag(raw, "mamba_conv_bias", True),
        norm_eps=norm_eps,
    )


def attention_sizes(
    raw: Raw, d_model: int, *, kv_heads: int | None = 8, scale: float | None = None
) -> AttentionSizes:
    """The attention layers; without ``kv_heads`` a file that does not say has one per head, without
    ``scale`` scores are divided by the root of the head's size."""
    heads = integer(raw, "num_attention_heads", 32)
    if "num_key_value_heads" in raw:
        kv_heads = None
    head_dim = integer(raw, "head_dim", d_model // heads)
    return AttentionSizes(
        heads=heads,
        kv_heads=integer(raw, "num_key_value_heads", kv_heads or heads),
        head_dim=head_dim,
        scale=head_dim**-0.5 if scale is None else scale,
        bias=flag(raw, "attention_bias", False),
    )
