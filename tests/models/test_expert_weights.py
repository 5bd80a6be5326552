"""Experts in every way that files hold them, and names of older and newer programs."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from stateferry.core.errors import ModelError
from stateferry.models.registry import load_model
from stateferry_kernels.dispatch import select_kernels
from support.hf_models import build
from support.model_walk import ModelWalk

Weights = dict[str, torch.Tensor]


@pytest.fixture
def nemotron(tmp_path: Path) -> Path:
    pattern = ["linear_attention", "moe", "full_attention"]
    build(tmp_path, "NemotronH", layers_block_type=pattern, n_routed_experts=4)
    return tmp_path


@pytest.fixture
def granite(tmp_path: Path) -> Path:
    build(tmp_path, "GraniteMoeHybrid")
    return tmp_path


def rewrite(model_dir: Path, change: Callable[[Weights], Weights]) -> None:
    file = model_dir / "model.safetensors"
    save_file(change(load_file(file)), file)


def logits(model_dir: Path) -> torch.Tensor:
    model = load_model(model_dir, dtype=torch.float32, kernels=select_kernels())
    return ModelWalk(model, 1).extend({0: range(3, 43)}, rows=range(40))


def renamed(weights: Weights, *renames: tuple[str, str]) -> Weights:
    for pattern, replacement in renames:
        weights = {re.sub(pattern, replacement, name): w for name, w in weights.items()}
    return weights


def stacked(weights: Weights) -> Weights:
    """The single experts of transformers' files, as one tensor each."""
    single = re.compile(r"(.*\.experts)\.\d+\.(\w+)\.weight")
    out = {name: w for name, w in weights.items() if not single.fullmatch(name)}
    for name in weights:
        if match := single.fullmatch(name):
            parts = [weights[f"{match[1]}.{e}.{match[2]}.weight"] for e in range(4)]
            out[f"{match[1]}.{match[2]}"] = torch.stack(parts)
    return out


def test_nemotron_with_stacked_experts_under_the_librarys_names(nemotron: Path) -> None:
    plain = logits(nemotron)
    rewrite(nemotron, lambda weights: renamed(stacked(weights), (r"^backbone\.", "model.")))
    assert torch.equal(logits(nemotron), plain)


def test_granite_under_the_librarys_names(granite: Path) -> None:
    plain = logits(granite)
    moe = "block_sparse_moe"
    rewrite(
        granite,
        lambda weights: renamed(
            weights,
            (rf"{moe}\.input_linear\.weight", f"{moe}.experts.gate_up_proj"),
            (rf"{moe}\.output_linear\.weight", f"{moe}.experts.down_proj"),
            (rf"{moe}\.router\.layer\.weight", f"{moe}.router.weight"),
        ),
    )
    assert torch.equal(logits(granite), plain)


def test_experts_stored_both_ways_are_refused(nemotron: Path) -> None:
    rewrite(nemotron, lambda weights: {**weights, **stacked(weights)})
    with pytest.raises(ModelError, match="two ways"):
        logits(nemotron)


def test_one_name_under_two_spellings_is_refused(nemotron: Path) -> None:
    norm = {"model.norm_f.weight": torch.ones(64)}
    rewrite(nemotron, lambda weights: {**weights, **norm})
    with pytest.raises(ModelError, match=r"norm_f\.weight: stored twice"):
        logits(nemotron)


@pytest.mark.parametrize(
    "name",
    [
        "backbone.layers.1.mixer.experts.2.down_proj.weight",
        "backbone.layers.1.mixer.gate.e_score_correction_bias",
        "backbone.layers.2.mixer.k_proj.weight",
    ],
)
def test_a_missing_part_is_named(nemotron: Path, name: str) -> None:
    rewrite(nemotron, lambda weights: {n: w for n, w in weights.items() if n != name})
    with pytest.raises(ModelError, match=rf"missing tensors {re.escape(name)} \(1 in all\)"):
        logits(nemotron)


def test_a_part_of_another_shape_is_named(nemotron: Path) -> None:
    name = "backbone.layers.1.mixer.experts.2.up_proj.weight"
    rewrite(nemotron, lambda weights: {**weights, name: torch.zeros(40, 63)})
    with pytest.raises(ModelError, match=rf"{re.escape(name)}: shape \(40, 63\), expected \(40"):
        logits(nemotron)


def test_layers_that_draft_are_left_out(nemotron: Path) -> None:
    plain = logits(nemotron)
    drafting = {"mtp.layers.0.mixer.q_proj.weight": torch.ones(3, 3)}
    rewrite(nemotron, lambda weights: {**weights, **drafting})
    assert torch.equal(logits(nemotron), plain)


def test_an_expert_too_many_is_unexpected(nemotron: Path) -> None:
    name = "backbone.layers.1.mixer.experts.4.up_proj.weight"
    rewrite(nemotron, lambda weights: {**weights, name: torch.zeros(40, 64)})
    with pytest.raises(ModelError, match=f"unexpected tensor {re.escape(name)}"):
        logits(nemotron)
