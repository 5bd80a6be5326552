"""What the loader refuses, ignores, and tells apart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from stateferry.core.errors import ModelError
from stateferry.core.weight_files import weight_files, weights_fingerprint
from stateferry.models.registry import load_model
from stateferry_kernels.dispatch import select_kernels
from support.tiny_model import write_tiny_model


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "tiny")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int8])
def test_other_dtypes_are_refused(tiny: Path, dtype: torch.dtype) -> None:
    with pytest.raises(ModelError, match=r"dtype torch\.\w+ is not supported; .*float32, bfloat16"):
        load_model(tiny, dtype=dtype, kernels=select_kernels())


def test_pickles_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ModelError, match="pickled weights are not read"):
        weight_files(tmp_path)


@pytest.mark.parametrize("written", [True, False])
def test_norm_before_gate_changes_nothing(tiny: Path, written: bool) -> None:
    config = json.loads((tiny / "config.json").read_text(encoding="utf-8"))
    plain = load_model(tiny, dtype=torch.float32, kernels=select_kernels())
    (tiny / "config.json").write_text(json.dumps({**config, "norm_before_gate": written}))
    loaded = load_model(tiny, dtype=torch.float32, kernels=select_kernels())
    assert loaded.config == plain.config  # type: ignore[attr-defined]


def test_the_fingerprint_sees_a_training_of_one_small_tensor(tmp_path: Path) -> None:
    model_dir = write_tiny_model(tmp_path, layers=8, hidden=256)
    file = model_dir / "model.safetensors"
    original, weights = weights_fingerprint(model_dir), load_file(file)
    assert file.stat().st_size > 6 << 20
    for name in weights:
        changed = weights[name].clone().view(-1)
        changed[0] += 1e-3
        changed = changed.view(weights[name].shape)
        save_file({**weights, name: changed}, file, metadata={"format": "pt"})
        assert weights_fingerprint(model_dir) != original, name
    save_file(weights, file, metadata={"format": "pt"})
    assert weights_fingerprint(model_dir) == original


@pytest.mark.parametrize("damage", [b"", b"\xff" * 64, b"\x04\0\0\0\0\0\0\0[1]\n"])
def test_a_damaged_file_has_no_fingerprint(tiny: Path, damage: bytes) -> None:
    (tiny / "model.safetensors").write_bytes(damage)
    with pytest.raises(ModelError, match="fingerprint"):
        weights_fingerprint(tiny)
