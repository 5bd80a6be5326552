"""Write a trained model as a Hugging Face directory, weights in bfloat16."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from stateferry.bundled.recipe import checkpoint, hf_config
from stateferry.bundled.recipe.model import LanguageModel
from stateferry.bundled.recipe.tokenizer import END_OF_TEXT_ID


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def export_model(model: LanguageModel, target: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write config.json, generation_config.json and model.safetensors into `target`.

    A tied model gets no lm_head tensor, as transformers itself saves it.
    """
    target.mkdir(parents=True, exist_ok=True)
    weights = {
        name: tensor.detach().to(dtype).contiguous().cpu()
        for name, tensor in model.state_dict().items()
    }
    broken = [name for name, tensor in weights.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise ValueError(f"not finite after the cast to {dtype}: {broken}")
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    (target / "model.safetensors").chmod(0o644)  # safetensors creates private files
    _write_json(target / "config.json", hf_config.huggingface_config(model.config, dtype))
    generation = {
        "bos_token_id": END_OF_TEXT_ID,
        "eos_token_id": END_OF_TEXT_ID,
        "pad_token_id": END_OF_TEXT_ID,
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 0.95,
    }
    _write_json(target / "generation_config.json", generation)


def export_checkpoint(folder: Path, target: Path) -> None:
    """Export the weights of a training checkpoint."""
    model, progress = checkpoint.load_model(folder)
    export_model(model, target)
    print(f"exported step {progress['step']} to {target}")


def load_exported(folder: Path) -> LanguageModel:
    """Open an exported directory in the recipe's own model, float32 on the CPU."""
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model = LanguageModel(hf_config.model_config(values))
    weights = load_file(folder / "model.safetensors")
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    return model.eval()
