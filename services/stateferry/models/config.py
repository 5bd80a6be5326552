"""A model's configuration: Hugging Face names come in, the field's names go out."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stateferry.core.errors import ModelError
from stateferry_kernels.layer_state import StateGeometry

SUPPORTED_ARCHITECTURES = ("Mamba2ForCausalLM",)


@dataclass(frozen=True, slots=True)
class Mamba2Config:
    """A pure Mamba-2 language model."""

    vocab_size: int
    d_model: int
    num_layers: int
    nheads: int
    headdim: int
    dstate: int
    ngroups: int
    d_conv: int
    chunk_size: int
    norm_eps: float
    dt_limit: tuple[float, float]
    in_out_bias: bool
    conv_bias: bool
    tie_embeddings: bool
    residual_in_fp32: bool

    @property
    def d_inner(self) -> int:
        return self.nheads * self.headdim

    @property
    def conv_dim(self) -> int:
        return self.d_inner + 2 * self.ngroups * self.dstate

    @property
    def geometry(self) -> StateGeometry:
        """What a state pool needs to know."""
        return StateGeometry(
            num_layers=self.num_layers,
            nheads=self.nheads,
            headdim=self.headdim,
            dstate=self.dstate,
            ngroups=self.ngroups,
            d_conv=self.d_conv,
            conv_dim=self.conv_dim,
        )


def read_config(model_dir: Path) -> Mapping[str, Any]:
    """The raw config.json. Raises ModelError when it is missing or not a JSON object."""
    path = model_dir / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise ModelError(f"{path} is not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ModelError(f"{path} does not hold a JSON object")
    return raw


def architecture_of(raw: Mapping[str, Any]) -> str:
    """The architecture to build. Raises ModelError listing what is supported."""
    named = raw.get("architectures") or []
    for name in named:
        if name in SUPPORTED_ARCHITECTURES:
            return str(name)
    raise ModelError(
        f"architectures {named} are not supported; supported: {', '.join(SUPPORTED_ARCHITECTURES)}"
    )


def mamba2_config(raw: Mapping[str, Any]) -> Mamba2Config:
    """Parse a ``Mamba2ForCausalLM`` config. Raises ModelError naming the option we cannot serve.

    ``norm_before_gate`` is ignored, as transformers does. Its first release wrote ``true`` by
    default, for weights that were trained with the gate first (its pull request 32686).
    """
    _require(raw, "hidden_act", raw.get("hidden_act", "silu") in ("silu", "swish"), "silu or swish")
    _require(raw, "rms_norm", raw.get("rms_norm", True) is True, "true")
    d_model = _positive(raw, "hidden_size", 4096)
    headdim = _positive(raw, "head_dim", 64)
    expand = raw.get("expand", 2)
    nheads = _positive(raw, "num_heads", 128)
    if expand * d_model != nheads * headdim:
        raise ModelError(
            f"num_heads {nheads} * head_dim {headdim} is not "
            f"expand {expand} * hidden_size {d_model}"
        )
    ngroups = _positive(raw, "n_groups", 8)
    if nheads % ngroups:
        raise ModelError(f"n_groups {ngroups} does not divide num_heads {nheads}")
    return Mamba2Config(
        vocab_size=_positive(raw, "vocab_size", 32768),
        d_model=d_model,
        num_layers=_positive(raw, "num_hidden_layers", 64),
        nheads=nheads,
        headdim=headdim,
        dstate=_positive(raw, "state_size", 128),
        ngroups=ngroups,
        d_conv=_positive(raw, "conv_kernel", 4),
        chunk_size=_positive(raw, "chunk_size", 256),
        norm_eps=float(raw.get("layer_norm_epsilon", 1e-5)),
        dt_limit=_limits(raw),
        in_out_bias=bool(raw.get("use_bias", False)),
        conv_bias=bool(raw.get("use_conv_bias", True)),
        tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
        residual_in_fp32=bool(raw.get("residual_in_fp32", True)),
    )


def _require(raw: Mapping[str, Any], option: str, fine: bool, supported: str) -> None:
    if not fine:
        raise ModelError(f"{option} = {raw.get(option)!r} is not supported; supported: {supported}")


def _positive(raw: Mapping[str, Any], option: str, default: int) -> int:
    value = raw.get(option, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ModelError(f"{option} = {value!r} is not a positive integer")
    return value


def _limits(raw: Mapping[str, Any]) -> tuple[float, float]:
    """``time_step_limit``; JSON has no infinity, so writers spell it in several ways."""
    value = raw.get("time_step_limit")
    if value is None:
        return (0.0, math.inf)
    try:
        low, high = (_number(bound) for bound in value)
    except (TypeError, ValueError) as error:
        raise ModelError(f"time_step_limit = {value!r} is not a pair of numbers") from error
    if math.isnan(low) or math.isnan(high) or low > high:
        raise ModelError(f"time_step_limit = {value!r} is not an interval")
    return (low, high)


def _number(bound: Any) -> float:
    if isinstance(bound, Mapping) and set(bound) == {"__float__"}:
        bound = bound["__float__"]
    return float(bound)
