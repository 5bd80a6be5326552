"""Weight files: every tensor accounted for, nothing outside the directory, nothing half read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from stateferry.core.errors import ModelError
from stateferry.core.weight_files import weight_files, weights_fingerprint
from stateferry.models.registry import load_model
from stateferry_kernels.dispatch import select_kernels
from support.model_walk import ModelWalk
from support.tiny_model import write_tiny_model


def load(model_dir: Path) -> Any:
    return load_model(model_dir, dtype=torch.float32, kernels=select_kernels())


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "tiny")


def rewrite(model_dir: Path, **changed: torch.Tensor | None) -> None:
    """Replace (or with None: drop) tensors of the one file."""
    file = model_dir / "model.safetensors"
    weights = {**load_file(file), **changed}
    save_file({k: v for k, v in weights.items() if v is not None}, file)


def shard(model_dir: Path) -> None:
    """Split the one file into two and an index, as big models come."""
    weights = load_file(model_dir / "model.safetensors")
    names = sorted(weights)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, mine in parts.items():
        save_file({name: weights[name] for name in mine}, model_dir / file)
    where = {name: file for file, mine in parts.items() for name in mine}
    index = model_dir / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where}), encoding="utf-8")
    (model_dir / "model.safetensors").unlink()


def logits(model_dir: Path) -> torch.Tensor:
    return ModelWalk(load(model_dir), 1).extend({0: range(3, 43)}, rows=range(40))


def test_sharded_and_single_files_give_the_same_model(tiny: Path) -> None:
    single = logits(tiny)
    shard(tiny)
    assert torch.equal(logits(tiny), single)


def test_a_missing_tensor_is_named(tiny: Path) -> None:
    rewrite(tiny, **{"backbone.layers.1.mixer.D": None})
    with pytest.raises(ModelError, match=r"backbone\.layers\.1\.mixer\.D"):
        load(tiny)


def test_an_unexpected_tensor_is_named(tiny: Path) -> None:
    rewrite(tiny, stray=torch.zeros(1))
    with pytest.raises(ModelError, match="unexpected tensor stray"):
        load(tiny)


def test_a_wrong_shape_is_named(tiny: Path) -> None:
    rewrite(tiny, **{"backbone.norm_f.weight": torch.ones(65)})
    with pytest.raises(ModelError, match=r"norm_f\.weight: shape \(65,\), expected \(64,\)"):
        load(tiny)


def test_integers_are_not_weights(tiny: Path) -> None:
    rewrite(tiny, **{"backbone.norm_f.weight": torch.ones(64, dtype=torch.int32)})
    with pytest.raises(ModelError, match="int32"):
        load(tiny)


def test_a_tied_head_that_was_stored_again_is_the_embedding(tiny: Path) -> None:
    plain = logits(tiny)
    embedding = load_file(tiny / "model.safetensors")["backbone.embeddings.weight"]
    rewrite(tiny, **{"lm_head.weight": embedding.clone()})
    model = load(tiny)
    assert model.head is model.embedding
    assert torch.equal(logits(tiny), plain)


def test_a_head_that_is_stored_in_spite_of_a_tie_counts(tiny: Path) -> None:
    rewrite(tiny, **{"lm_head.weight": torch.zeros(259, 64)})
    assert not logits(tiny).any()


def test_early_names_of_the_embedding_are_known(tiny: Path) -> None:
    plain = logits(tiny)
    embedding = load_file(tiny / "model.safetensors")["backbone.embeddings.weight"]
    early = {"backbone.embedding.weight": embedding.clone(), "backbone.embeddings.weight": None}
    rewrite(tiny, **early)
    assert torch.equal(logits(tiny), plain)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_floating_point_dtype_is_converted(tiny: Path, dtype: torch.dtype) -> None:
    weights = load_file(tiny / "model.safetensors")
    rewrite(tiny, **{name: tensor.to(dtype) for name, tensor in weights.items()})
    model = load(tiny)
    stored = weights["backbone.layers.1.mixer.in_proj.weight"].to(dtype)
    assert torch.equal(model.blocks[1].layer.in_proj, stored.float())


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "x.bin", "", 5])
def test_an_index_cannot_lead_outside(tiny: Path, name: object) -> None:
    index = tiny / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}), encoding="utf-8")
    with pytest.raises(ModelError):
        weight_files(tiny)


@pytest.mark.parametrize("damage", [b"", b"\x00" * 7, b"\xff" * 64])
def test_a_damaged_file_is_refused(tiny: Path, damage: bytes) -> None:
    (tiny / "model.safetensors").write_bytes(damage)
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        load(tiny)


def test_no_weights_at_all(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="holds neither"):
        weight_files(tmp_path)


def test_progress_ends_at_the_total(tiny: Path) -> None:
    seen: list[tuple[int, int]] = []
    load_model(
        tiny,
        dtype=torch.float32,
        kernels=select_kernels(),
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == sorted(seen) and seen[-1][0] == seen[-1][1]


def test_the_fingerprint_sees_any_change(tiny: Path, tmp_path: Path) -> None:
    original = weights_fingerprint(tiny)
    assert original == weights_fingerprint(write_tiny_model(tmp_path / "same"))
    assert original != weights_fingerprint(write_tiny_model(tmp_path / "other", seed=1))
    config = (tiny / "config.json").read_text(encoding="utf-8")
    (tiny / "config.json").write_text(config + " ", encoding="utf-8")
    assert original != weights_fingerprint(tiny)
