"""Random transformers models of every architecture, saved as their users would save them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

VOCAB = 317

_TOKENS = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

_PREFIXED_MIXER = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_d_state": 16,
    "mamba_chunk_size": 32,
    "mamba_expand": 2,
}

_ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}

BASES: dict[str, dict[str, Any]] = {
    "Mamba2": {
        "hidden_size": 64,
        "num_heads": 8,
        "head_dim": 16,
        "state_size": 16,
        "num_hidden_layers": 2,
        "expand": 2,
        "n_groups": 1,
        "chunk_size": 32,
        "tie_word_embeddings": True,
        "initializer_range": 0.2,
    },
    "NemotronH": {
        **_ATTENTION,
        "hidden_size": 64,
        "layers_block_type": ["linear_attention", "full_attention", "mlp", "linear_attention"],
        "head_dim": 16,
        "intermediate_size": 96,
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "ssm_state_size": 16,
        "n_groups": 2,
        "chunk_size": 32,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 40,
        "moe_shared_expert_intermediate_size": 56,
        "initializer_range": 0.2,
        "rescale_prenorm_residual": False,
    },
    "FalconH1": {
        **_PREFIXED_MIXER,
        **_ATTENTION,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "intermediate_size": 96,
        "mamba_d_ssm": 128,
        "initializer_range": 0.2,
        "embedding_multiplier": 5.65,
        "lm_head_multiplier": 0.039,
        "mlp_multipliers": [0.88, 0.59],
        "key_multiplier": 0.38,
        "attention_in_multiplier": 1.1,
        "attention_out_multiplier": 0.93,
        "ssm_multipliers": [0.35, 0.29, 0.41, 0.52, 0.7],
        "ssm_in_multiplier": 1.25,
        "ssm_out_multiplier": 0.47,
    },
    "GraniteMoeHybrid": {
        **_PREFIXED_MIXER,
        **_ATTENTION,
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "intermediate_size": 40,
        "shared_intermediate_size": 56,
        "num_local_experts": 6,
        "num_experts_per_tok": 3,
        "embedding_multiplier": 12.0,
        "attention_multiplier": 0.11,
        "residual_multiplier": 0.22,
        "logits_scaling": 6.0,
        "initializer_range": 0.2,
    },
    "Bamba": {
        **_PREFIXED_MIXER,
        **_ATTENTION,
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "attn_layer_indices": [1],
        "intermediate_size": 96,
        "initializer_range": 0.2,
    },
}

# Each differs from its base in what it names.
CONFIGS: dict[str, dict[str, dict[str, Any]]] = {
    "Mamba2": {
        "plain": {},
        "four groups": {"n_groups": 4, "state_size": 24, "layer_norm_epsilon": 0.01},
        "chunk of 48, untied": {"chunk_size": 48, "tie_word_embeddings": False},
        "biases": {"use_bias": True, "n_groups": 2},
        "no conv bias": {"use_conv_bias": False, "head_dim": 32, "num_heads": 4},
        "time step limit": {"time_step_limit": (0.01, 0.3), "head_dim": 64, "num_heads": 2},
        "odd sizes": {
            "hidden_size": 72,
            "num_heads": 6,
            "head_dim": 24,
            "n_groups": 3,
            "conv_kernel": 3,
        },
    },
    "NemotronH": {
        "mamba, attention, mlp": {},
        "experts": {"layers_block_type": ["linear_attention", "moe", "full_attention", "moe"]},
        "latent experts in groups, biases": {
            "layers_block_type": ["moe", "linear_attention", "full_attention", "mlp"],
            "n_routed_experts": 12,
            "n_group": 4,
            "topk_group": 2,
            "num_experts_per_tok": 4,
            "moe_latent_size": 24,
            "routed_scaling_factor": 2.5,
            "mlp_bias": True,
            "use_bias": True,
        },
        "unnormalized experts, odd groups": {
            "layers_block_type": ["linear_attention", "moe", "linear_attention"],
            "norm_topk_prob": False,
            "n_groups": 3,
            "mamba_num_heads": 6,
            "mamba_head_dim": 24,
            "ssm_state_size": 40,
        },
        "one kv head, no conv bias": {
            "num_attention_heads": 5,
            "num_key_value_heads": 1,
            "head_dim": 24,
            "use_conv_bias": False,
            "chunk_size": 20,
            "conv_kernel": 3,
        },
        "least time step, attention first": {
            "layers_block_type": ["full_attention", "linear_attention", "mlp"],
            "time_step_min": 0.3,
            "layer_norm_epsilon": 0.01,
            "num_key_value_heads": 4,
        },
    },
    "FalconH1": {
        "no norm": {},
        "norm before gate": {"mamba_rms_norm": True, "mamba_n_groups": 2, "rms_norm_eps": 0.01},
        "gate before norm, untied": {
            "mamba_rms_norm": True,
            "mamba_norm_before_gate": False,
            "tie_word_embeddings": False,
        },
        "biases, tied": {
            "mamba_proj_bias": True,
            "projectors_bias": True,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
        },
        "mixer bias alone, no conv bias": {
            "mamba_proj_bias": True,
            "mamba_conv_bias": False,
            "mamba_d_ssm": 96,
            "mamba_n_heads": 4,
            "mamba_d_head": 24,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e11},
        },
        "head size of its own, time step limit": {
            "head_dim": 24,
            "num_key_value_heads": 1,
            "time_step_limit": (0.01, 0.6),
            "mamba_chunk_size": 20,
        },
    },
    "GraniteMoeHybrid": {
        "experts, no positions": {"rms_norm_eps": 0.01},
        "experts, rope": {"position_embedding_type": "rope", "num_experts_per_tok": 6},
        "dense, tied": {"num_local_experts": 0, "tie_word_embeddings": True},
        "dense, rope, biases": {
            "num_local_experts": 0,
            "position_embedding_type": "rope",
            "attention_bias": True,
            "mamba_proj_bias": True,
        },
        "one expert each, odd groups": {
            "num_experts_per_tok": 1,
            "mamba_n_groups": 3,
            "mamba_n_heads": 6,
            "mamba_d_head": 24,
            "hidden_size": 72,
            "num_key_value_heads": 1,
        },
        "attention first, no conv bias": {
            "layer_types": ["full_attention", "full_attention", "linear_attention"],
            "mamba_conv_bias": False,
            "mamba_chunk_size": 20,
            "mamba_d_state": 40,
            "time_step_limit": (0.01, 0.6),
        },
    },
    "Bamba": {
        "plain": {},
        "tied, two groups": {
            "tie_word_embeddings": True,
            "mamba_n_groups": 2,
            "rms_norm_eps": 0.01,
        },
        "biases": {"attention_bias": True, "mamba_proj_bias": True, "mlp_bias": True},
        "attention first and last": {
            "attn_layer_indices": [0, 2],
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
            "mamba_chunk_size": 20,
        },
        "no conv bias, time step limit": {
            "mamba_conv_bias": False,
            "time_step_limit": (0.01, 0.6),
            "mamba_d_conv": 3,
            "mamba_d_state": 40,
        },
        "odd sizes": {
            "hidden_size": 96,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "mamba_n_heads": 6,
            "mamba_d_head": 32,
            "mamba_n_groups": 3,
            "num_hidden_layers": 2,
        },
    },
}

CASES = [(architecture, name) for architecture, named in CONFIGS.items() for name in named]


def build(model_dir: Path, architecture: str, seed: int = 0, **changes: Any) -> Any:
    """A random transformers model, saved to ``model_dir``."""
    torch.manual_seed(seed)
    options = {**_TOKENS, **BASES[architecture], **changes}
    config = getattr(transformers, f"{architecture}Config")(**options)
    model = getattr(transformers, f"{architecture}ForCausalLM")(config).eval()
    with torch.no_grad():
        # The library starts biases and norms at 0 and 1, where a mix-up would not show.
        for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith(("bias", "norm.weight", "norm_f.weight", "layernorm.weight", ".D")):
                parameter += 0.1 * torch.randn_like(parameter)
            elif name.endswith("A_log"):
                parameter += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(model_dir)
    return model


@torch.inference_mode()
def logits_of(model: Any, ids: list[int]) -> torch.Tensor:
    """Their logits of every position, (len(ids), vocab_size) fp32, by one full forward.

    Not by their cached step: that of this release ignores time_step_limit, so it disagrees with
    the library's own full forward.
    """
    logits: torch.Tensor = model(torch.tensor([ids]), use_cache=False).logits[0].float()
    return logits
