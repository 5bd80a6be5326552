"""Training state on disk: safetensors shards and one JSON file, nothing executable."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from stateferry.bundled.recipe.config import config_from_dict
from stateferry.bundled.recipe.model import LanguageModel

SHARD_BYTES = 15_000_000


def _save_shards(folder: Path, stem: str, tensors: dict[str, Tensor]) -> None:
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        tensor_bytes = tensor.numel() * tensor.element_size()
        if size and size + tensor_bytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor.detach().contiguous().cpu()
        size += tensor_bytes
    for number, shard in enumerate(shards):
        save_file(shard, folder / f"{stem}-{number}.safetensors")


def _load_shards(folder: Path, stem: str) -> dict[str, Tensor]:
    paths = sorted(folder.glob(f"{stem}-*.safetensors"))
    if not paths:
        raise FileNotFoundError(f"no {stem} shards in {folder}")
    return {name: tensor for path in paths for name, tensor in load_file(path).items()}


def save(
    folder: Path,
    model: LanguageModel,
    optimizer: torch.optim.Optimizer | None,
    progress: dict[str, Any],
) -> None:
    """Write float32 weights, bfloat16 moments (enough to resume) and `progress`."""
    folder.mkdir(parents=True, exist_ok=True)
    _save_shards(folder, "weights", dict(model.state_dict()))
    if optimizer is not None:
        for kind in ("exp_avg", "exp_avg_sq"):
            moments = {
                name: optimizer.state[parameter][kind].to(torch.bfloat16)
                for name, parameter in model.named_parameters()
                if parameter in optimizer.state
            }
            _save_shards(folder, kind, moments)
    record = {"config": dataclasses.asdict(model.config), "progress": progress}
    (folder / "state.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def load_model(folder: Path) -> tuple[LanguageModel, dict[str, Any]]:
    """Return the model (float32, CPU) and the progress record."""
    record = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    model = LanguageModel(config_from_dict(record["config"]))
    model.load_state_dict(_load_shards(folder, "weights"))
    progress: dict[str, Any] = record["progress"]
    return model, progress


def restore_moments(
    folder: Path, model: LanguageModel, optimizer: torch.optim.Optimizer, steps: int
) -> None:
    """Put saved AdamW moments back, so that a resumed run goes on without a new warm-up."""
    averages = _load_shards(folder, "exp_avg")
    squares = _load_shards(folder, "exp_avg_sq")
    for name, parameter in model.named_parameters():
        optimizer.state[parameter] = {
            "step": torch.tensor(float(steps), device=parameter.device),
            "exp_avg": averages[name].to(parameter.device, torch.float32),
            "exp_avg_sq": squares[name].to(parameter.device, torch.float32),
        }
