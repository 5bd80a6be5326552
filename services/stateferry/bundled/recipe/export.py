"""Write a trained model as a Hugging Face directory, weights in bfloat16."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from stateferry.bundled.recipe import checkpoint
from stateferry.bundled.recipe.model import LanguageModel, ModelConfig
from stateferry.bundled.recipe.tokenizer import END_OF_TEXT_ID


def huggingface_config(config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The config.json of transformers' Mamba2ForCausalLM."""
    if set(config.layer_types) != {"mamba2"}:
        raise ValueError(f"Mamba2ForCausalLM has only mamba2 layers, not {config.layer_types}")
    return {
        "architectures": ["Mamba2ForCausalLM"],
        "model_type": "mamba2",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": len(config.layer_types),
        "expand": config.expand,
        "num_heads": config.num_heads,
        "head_dim": config.head_dim,
        "state_size": config.state_size,
        "n_groups": config.n_groups,
        "conv_kernel": config.conv_kernel,
        "chunk_size": config.chunk_size,
        "hidden_act": "silu",
        "use_bias": False,
        "use_conv_bias": True,
        "layer_norm_epsilon": config.layer_norm_epsilon,
        "rms_norm": True,
        "residual_in_fp32": True,
        "rescale_prenorm_residual": False,
        "initializer_range": 0.02,
        "time_step_rank": (config.hidden_size + 15) // 16,
        "time_step_min": 0.001,
        "time_step_max": 0.1,
        "time_step_floor": 0.0001,
        # JSON has no infinity; this is how transformers spells the unlimited step size.
        "time_step_limit": [0.0, {"__float__": "Infinity"}],
        "tie_word_embeddings": True,
        "bos_token_id": END_OF_TEXT_ID,
        "eos_token_id": END_OF_TEXT_ID,
        "pad_token_id": END_OF_TEXT_ID,
        "use_cache": True,
        "dtype": str(dtype).removeprefix("torch."),
    }


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def export_model(model: LanguageModel, target: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write config.json, generation_config.json and model.safetensors into `target`.

    The output matrix is tied to the embedding, so there is no lm_head tensor, as transformers
    itself saves a tied model.
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
    _write_json(target / "config.json", huggingface_config(model.config, dtype))
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
    config = ModelConfig(
        vocab_size=values["vocab_size"],
        hidden_size=values["hidden_size"],
        layer_types=("mamba2",) * values["num_hidden_layers"],
        expand=values["expand"],
        head_dim=values["head_dim"],
        state_size=values["state_size"],
        n_groups=values["n_groups"],
        conv_kernel=values["conv_kernel"],
        chunk_size=values["chunk_size"],
        layer_norm_epsilon=values["layer_norm_epsilon"],
    )
    model = LanguageModel(config)
    weights = load_file(folder / "model.safetensors")
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    return model.eval()
