"""Configurations: Hugging Face spellings in, clear refusals out."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from stateferry.core.errors import ModelError
from stateferry.models.config import architecture_of, mamba2_config, read_config

SMALL = {
    "architectures": ["Mamba2ForCausalLM"],
    "hidden_size": 64,
    "num_heads": 8,
    "head_dim": 16,
    "n_groups": 2,
    "state_size": 16,
    "num_hidden_layers": 2,
    "vocab_size": 300,
}


def test_names_and_geometry() -> None:
    config = mamba2_config({**SMALL, "chunk_size": 48, "conv_kernel": 3})
    assert (config.d_inner, config.conv_dim, config.chunk_size) == (128, 192, 48)
    geometry = config.geometry
    assert (geometry.nheads, geometry.headdim, geometry.dstate) == (8, 16, 16)
    assert (geometry.ngroups, geometry.d_conv, geometry.conv_dim) == (2, 3, 192)


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
    raw = {**SMALL, "time_step_limit": written}
    (tmp_path / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    assert mamba2_config(read_config(tmp_path)).dt_limit == read


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("hidden_act", "gelu"),
        ("rms_norm", False),
        ("n_groups", 3),
        ("num_heads", 7),
        ("head_dim", 0),
        ("vocab_size", "many"),
        ("chunk_size", True),
        ("time_step_limit", [1.0, 0.5]),
        ("time_step_limit", "all"),
    ],
)
def test_an_option_that_cannot_be_served_is_named(option: str, value: object) -> None:
    with pytest.raises(ModelError, match=option):
        mamba2_config({**SMALL, option: value})


def test_an_unsupported_architecture_lists_the_supported() -> None:
    with pytest.raises(ModelError, match=r"LlamaForCausalLM.*Mamba2ForCausalLM"):
        architecture_of({"architectures": ["LlamaForCausalLM"]})


@pytest.mark.parametrize("content", ["", "[]", "{", "\x00"])
def test_a_config_that_is_no_object_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(ModelError, match=r"config\.json"):
        read_config(tmp_path)


def test_a_missing_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json"):
        read_config(tmp_path)
