"""Configurations: Hugging Face spellings in, clear refusals out."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stateferry.core.errors import ModelError
from stateferry.models.bamba.config import bamba_config
from stateferry.models.falcon_h1.config import falcon_h1_config
from stateferry.models.granite_hybrid.config import granite_hybrid_config
from stateferry.models.mamba2.config import mamba2_config
from stateferry.models.nemotron_h.config import nemotron_h_config
from stateferry.models.options import read_config
from stateferry.models.registry import SUPPORTED_ARCHITECTURES, architecture_of

MAMBA2 = {
    "hidden_size": 64,
    "num_heads": 8,
    "head_dim": 16,
    "n_groups": 2,
    "state_size": 16,
    "num_hidden_layers": 2,
    "vocab_size": 300,
}
NEMOTRON_H = {"hidden_size": 64, "layers_block_type": ["linear_attention", "moe"]}
PREFIXED = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "mamba_n_heads": 8,
}


def test_names_and_geometry() -> None:
    config = mamba2_config({**MAMBA2, "chunk_size": 48, "conv_kernel": 3})
    assert (config.mixer.d_inner, config.mixer.conv_dim, config.chunk_size) == (128, 192, 48)
    geometry = config.mixer.state_geometry(config.num_layers)
    assert (geometry.num_layers, geometry.nheads, geometry.headdim) == (2, 8, 16)
    assert (geometry.dstate, geometry.ngroups, geometry.d_conv) == (16, 2, 3)
    assert geometry.conv_dim == 192


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ([0.0, math.inf], (0.0, math.inf)),
        (["0.0", "Infinity"], (0.0, math.inf)),
        ([0.001, {"__float__": "Infinity"}], (0.001, math.inf)),
        ([0.001, 0.1], (0.001, 0.1)),
        (None, (0.0, math.inf)),
    ],
)
def test_time_step_limit_in_every_spelling(
    written: object, read: tuple[float, float], tmp_path: Path
) -> None:
    raw = {**MAMBA2, "time_step_limit": written}
    (tmp_path / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    assert mamba2_config(read_config(tmp_path)).mixer.dt_limit == read


@pytest.mark.parametrize(
    "spelling",
    [
        {"layers_block_type": ["linear_attention", "full_attention", "mlp", "moe"]},
        {"layers_block_type": ["mamba", "attention", "mlp", "moe"], "num_hidden_layers": 9},
        {"hybrid_override_pattern": "M*-E", "layers_block_type": None},
    ],
)
def test_a_pattern_of_layers_in_every_spelling(spelling: dict[str, object]) -> None:
    config = nemotron_h_config({**NEMOTRON_H, **spelling})
    assert "".join(kind.value for kind in config.kinds) == "M*-E"


def test_what_a_model_has_not_is_not_asked_for() -> None:
    dense = {"layers_block_type": ["mamba", "mlp"], "n_routed_experts": 0}
    assert nemotron_h_config({**NEMOTRON_H, **dense}).moe is None
    assert nemotron_h_config({**NEMOTRON_H, "num_key_value_heads": None}).attention.kv_heads == 32
    assert bamba_config({**PREFIXED, "num_key_value_heads": None}).attention.kv_heads == 4


def test_rope_of_older_and_newer_files() -> None:
    new = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
    old = {"rope_theta": 500.0, "rope_scaling": None}
    for written in (new, old):
        assert falcon_h1_config({**PREFIXED, **written}).rotary.theta == 500.0
    assert falcon_h1_config(PREFIXED).rotary.theta == 10_000.0
    # Half of a head of 16.
    assert bamba_config(PREFIXED).rotary.rotary_dim == 8
    assert falcon_h1_config(PREFIXED).rotary.rotary_dim == 16


def test_granite_with_and_without_positions() -> None:
    for written in ({}, {"position_embedding_type": None}, {"position_embedding_type": "nope"}):
        assert granite_hybrid_config({**PREFIXED, **written}).rotary is None
    rope = {"position_embedding_type": "rope"}
    assert granite_hybrid_config({**PREFIXED, **rope}).rotary is not None


def test_the_width_of_falcons_mixer() -> None:
    assert falcon_h1_config({**PREFIXED, "mamba_d_ssm": 96}).mixer.d_inner == 96
    assert falcon_h1_config({**PREFIXED, "mamba_d_ssm": None}).mixer.d_inner == 128


REFUSED: list[tuple[Callable[[Any], Any], dict[str, Any], str, Any]] = [
    (mamba2_config, MAMBA2, "hidden_act", "gelu"),
    (mamba2_config, MAMBA2, "rms_norm", False),
    (mamba2_config, MAMBA2, "n_groups", 3),
    (mamba2_config, MAMBA2, "num_heads", 7),
    (mamba2_config, MAMBA2, "head_dim", 0),
    (mamba2_config, MAMBA2, "vocab_size", "many"),
    (mamba2_config, MAMBA2, "chunk_size", True),
    (mamba2_config, MAMBA2, "use_bias", 1),
    (mamba2_config, MAMBA2, "layer_norm_epsilon", 0.0),
    (mamba2_config, MAMBA2, "time_step_limit", [1.0, 0.5]),
    (mamba2_config, MAMBA2, "time_step_limit", "all"),
    (nemotron_h_config, NEMOTRON_H, "layers_block_type", ["mamba", "sliding"]),
    (nemotron_h_config, NEMOTRON_H, "layers_block_type", []),
    (nemotron_h_config, NEMOTRON_H, "layers_block_type", None),
    (nemotron_h_config, NEMOTRON_H, "layers_block_type", 5),
    (nemotron_h_config, NEMOTRON_H, "mlp_hidden_act", "silu"),
    (nemotron_h_config, NEMOTRON_H, "attention_bias", True),
    (nemotron_h_config, NEMOTRON_H, "sliding_window", 128),
    (nemotron_h_config, NEMOTRON_H, "num_key_value_heads", 5),
    (nemotron_h_config, NEMOTRON_H, "n_group", 3),
    (nemotron_h_config, NEMOTRON_H, "topk_group", 2),
    (nemotron_h_config, NEMOTRON_H, "num_experts_per_tok", 9),
    (falcon_h1_config, PREFIXED, "mamba_d_head", 17),
    (falcon_h1_config, PREFIXED, "mlp_multipliers", [1.0]),
    (falcon_h1_config, PREFIXED, "ssm_multipliers", [1.0, 1.0, 1.0, 1.0, math.nan]),
    (falcon_h1_config, PREFIXED, "key_multiplier", "half"),
    (falcon_h1_config, PREFIXED, "rope_scaling", {"type": "yarn", "factor": 4.0}),
    (falcon_h1_config, PREFIXED, "rope_parameters", "none"),
    (granite_hybrid_config, PREFIXED, "position_embedding_type", "alibi"),
    (granite_hybrid_config, PREFIXED, "layer_types", ["mamba"]),
    (granite_hybrid_config, PREFIXED, "layer_types", ["mamba", "conv"]),
    (granite_hybrid_config, PREFIXED, "residual_multiplier", 0.0),
    (granite_hybrid_config, PREFIXED, "num_experts_per_tok", 0),
    (bamba_config, PREFIXED, "attn_layer_indices", [2]),
    (bamba_config, PREFIXED, "attn_layer_indices", "first"),
    (bamba_config, PREFIXED, "partial_rotary_factor", 0.1),
]


@pytest.mark.parametrize(("parse", "fine", "option", "value"), REFUSED)
def test_an_option_that_cannot_be_served_is_named(
    parse: Callable[[Any], Any], fine: dict[str, Any], option: str, value: object
) -> None:
    if parse is falcon_h1_config:
        fine = {**fine, "mamba_d_ssm": 128}
    parse(fine)
    named = "rope_type" if option == "rope_scaling" else option
    with pytest.raises(ModelError, match=named):
        parse({**fine, option: value})


def test_an_unsupported_architecture_lists_the_supported() -> None:
    with pytest.raises(ModelError, match=r"LlamaForCausalLM") as error:
        architecture_of({"architectures": ["LlamaForCausalLM"]})
    assert all(name in str(error.value) for name in SUPPORTED_ARCHITECTURES)


def test_an_unsupported_activation_lists_the_supported() -> None:
    with pytest.raises(ModelError, match=r"hidden_act = 'gelu'.*silu.*swish"):
        bamba_config({**PREFIXED, "hidden_act": "gelu"})


@pytest.mark.parametrize("content", ["", "[]", "{", "\x00"])
def test_a_config_that_is_no_object_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(ModelError, match=r"config\.json"):
        read_config(tmp_path)


def test_a_missing_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json"):
        read_config(tmp_path)
