"""fp32 activations and bf16 weights: the numbers of widened weights, rows that do not know each
other, and a model that keeps what bf16 holds exactly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stateferry.bundled import bundled_model_dir
from stateferry.models.registry import load_model
from stateferry_kernels.operations import Kernels
from support.backends import kernels_of, native_or_skip
from support.model_walk import ModelWalk
from support.tiny_model import write_tiny_model

ROWS = (1, 2, 3, 5, 8, 47, 48, 49, 130)
SIZES = ((768, 100), (33, 7), (64, 24), (31, 50), (1, 3), (200, 65))


@pytest.fixture
def cpu() -> Kernels:
    native_or_skip()
    return kernels_of("cpu")


@pytest.mark.parametrize(("inputs", "outputs"), SIZES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_it_is_the_product_with_the_widened_weight(
    cpu: Kernels, inputs: int, outputs: int, with_bias: bool
) -> None:
    torch.manual_seed(inputs)
    weight = torch.randn(outputs, inputs).bfloat16()
    bias = torch.randn(outputs) if with_bias else None
    for rows in ROWS:
        x = torch.randn(rows, inputs)
        out = cpu.linear(x, weight, bias)
        wanted = torch.nn.functional.linear(
            x.double(), weight.double(), None if bias is None else bias.double()
        )
        assert out.dtype == torch.float32
        assert (out - wanted).norm() / wanted.norm() < 1e-6
        # Each row by itself, from memory with other strides.
        wide = torch.full((rows, inputs + 5), torch.nan)
        wide[:, :inputs] = x
        alone = [cpu.linear(wide[r : r + 1, :inputs], weight, bias) for r in range(rows)]
        assert torch.equal(torch.cat(alone), out)


def test_a_wide_weight_under_narrow_activations_is_refused(cpu: Kernels) -> None:
    with pytest.raises(TypeError, match="weight"):
        cpu.linear(torch.zeros(1, 4).bfloat16(), torch.zeros(3, 4), None)


def walk(model_dir: Path, kernels: Kernels) -> torch.Tensor:
    model = load_model(model_dir, dtype=torch.float32, kernels=kernels)
    steps = ModelWalk(model, 1)
    logits = [steps.extend({0: range(3, 133)}, rows=range(130))]
    logits += [steps.decode({0: token}) for token in (7, 8, 9)]
    return torch.cat(logits)


def test_a_checkpoint_of_bf16_is_held_as_that_and_computes_the_same(cpu: Kernels) -> None:
    model_dir = bundled_model_dir()
    model = load_model(model_dir, dtype=torch.float32, kernels=cpu)
    assert model.dtype == torch.float32
    assert model.head.dtype == model.embedding.dtype == torch.bfloat16  # type: ignore[attr-defined]
    ours, wanted = walk(model_dir, cpu), walk(model_dir, kernels_of("torch"))
    assert (ours - wanted).norm() / wanted.norm() < 1e-5


def test_what_bf16_does_not_hold_stays_wide(cpu: Kernels, tmp_path: Path) -> None:
    model = load_model(write_tiny_model(tmp_path / "m"), dtype=torch.float32, kernels=cpu)
    assert model.head.dtype == torch.float32  # type: ignore[attr-defined]


def test_other_backends_get_what_they_can_take() -> None:
    for name in ("torch", "reference"):
        model = load_model(bundled_model_dir(), dtype=torch.float32, kernels=kernels_of(name))
        assert model.head.dtype == torch.float32  # type: ignore[attr-defined]
