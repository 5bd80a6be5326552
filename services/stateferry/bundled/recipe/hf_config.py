"""The config.json of an exported model, written and read back."""

from __future__ import annotations

from typing import Any

import torch

from stateferry.bundled.recipe.config import ModelConfig
from stateferry.bundled.recipe.tokenizer import END_OF_TEXT_ID

# NemotronH's words for the kinds of layer.
_BLOCK_TYPES = {"mamba2": "linear_attention", "attention": "full_attention", "mlp": "mlp"}


def huggingface_config(config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """A config.json: Mamba2ForCausalLM if all layers are Mamba-2, else NemotronHForCausalLM."""
    pure = set(config.layer_types) == {"mamba2"}
    return {
        **(_mamba2(config) if pure else _nemotron_h(config)),
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "expand": config.expand,
        "n_groups": config.n_groups,
        "conv_kernel": config.conv_kernel,
        "chunk_size": config.chunk_size,
        "use_bias": False,
        "use_conv_bias": True,
        "layer_norm_epsilon": config.layer_norm_epsilon,
        "residual_in_fp32": True,
        "rescale_prenorm_residual": False,
        "initializer_range": 0.02,
        "time_step_max": 0.1,
        "time_step_floor": 0.0001,
        # JSON has no infinity; this is how transformers spells the unlimited step size.
        "time_step_limit": [0.0, {"__float__": "Infinity"}],
        "tie_word_embeddings": config.tied,
        "bos_token_id": END_OF_TEXT_ID,
        "eos_token_id": END_OF_TEXT_ID,
        "pad_token_id": END_OF_TEXT_ID,
        "use_cache": True,
        "dtype": str(dtype).removeprefix("torch."),
    }


def _mamba2(config: ModelConfig) -> dict[str, Any]:
    if not config.tied:
        raise ValueError("the recipe's Mamba2 models are tied")
    if config.time_step_min:
        raise ValueError("Mamba2ForCausalLM has no smallest step size, and the model was given one")
    return {
        "architectures": ["Mamba2ForCausalLM"],
        "model_type": "mamba2",
        "num_hidden_layers": len(config.layer_types),
        "num_heads": config.num_heads,
        "head_dim": config.head_dim,
        "state_size": config.state_size,
        "hidden_act": "silu",
        "rms_norm": True,
        "time_step_rank": (config.hidden_size + 15) // 16,
        "time_step_min": 0.001,  # of the initial step sizes; nothing is cut off there
    }


def _nemotron_h(config: ModelConfig) -> dict[str, Any]:
    if config.tied:
        raise ValueError("NemotronHForCausalLM has an output matrix of its own")
    return {
        "architectures": ["NemotronHForCausalLM"],
        "model_type": "nemotron_h",
        "layers_block_type": [_BLOCK_TYPES[kind] for kind in config.layer_types],
        "mamba_num_heads": config.num_heads,
        "mamba_head_dim": config.head_dim,
        "ssm_state_size": config.state_size,
        "mamba_hidden_act": "silu",
        "mamba_proj_bias": False,
        "time_step_min": config.time_step_min,
        "num_attention_heads": config.attention_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "attention_bias": False,
        "intermediate_size": config.mlp_size,
        "mlp_hidden_act": "relu2",
        "mlp_bias": False,
    }


def model_config(values: dict[str, Any]) -> ModelConfig:
    """The recipe's configuration of an exported config.json."""
    common = {
        name: values[name]
        for name in (
            "vocab_size",
            "hidden_size",
            "expand",
            "n_groups",
            "conv_kernel",
            "chunk_size",
            "layer_norm_epsilon",
        )
    }
    if values["model_type"] == "mamba2":
        return ModelConfig(
            **common,
            layer_types=("mamba2",) * values["num_hidden_layers"],
            head_dim=values["head_dim"],
            state_size=values["state_size"],
        )
    kinds = {theirs: ours for ours, theirs in _BLOCK_TYPES.items()}
    return ModelConfig(
        **common,
        layer_types=tuple(kinds[block] for block in values["layers_block_type"]),
        head_dim=values["head_dim"],
        state_size=values["ssm_state_size"],
        time_step_min=values["time_step_min"],
        attention_heads=values["num_attention_heads"],
        kv_heads=values["num_key_value_heads"],
        mlp_size=values["intermediate_size"],
        tied=False,
    )
