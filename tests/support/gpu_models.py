"""Random models of any size, written without transformers, which a GPU host may not have."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from stateferry.cache.pools import build_pools
from stateferry.core.worker import PoolSizes
from stateferry.models.caches import LayerCaches
from stateferry.models.model import Model
from support.tiny_model import EOS_ID, byte_tokenizer


@dataclass(frozen=True, slots=True)
class Sizes:
    hidden: int = 64
    vocab: int = 259
    headdim: int = 16
    dstate: int = 16
    ngroups: int = 2
    attention_heads: int = 4
    kv_heads: int = 2
    attention_head_dim: int = 16
    intermediate: int = 96

    @property
    def nheads(self) -> int:
        return 2 * self.hidden // self.headdim


def write_small_model(folder: Path, architecture: str, **options: Any) -> Path:
    """A few layers, a vocabulary of bytes."""
    pattern = {"Mamba2": "MM", "NemotronH": "M*-M", "experts": "ME"}[architecture]
    return write_random_model(folder, pattern, Sizes(**options))


def write_random_model(
    folder: Path,
    pattern: str,
    sizes: Sizes,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Path:
    """A model of M(amba), * (attention), - (MLP) and E(xperts) layers: Mamba2 where all are M, else
    NemotronH. Weights are scaled so that activations stay of one size, whatever the sizes;
    they are drawn on ``device``."""
    folder.mkdir(parents=True, exist_ok=True)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    plain = set(pattern) == {"M"}
    config = _mamba2_config(pattern, sizes) if plain else _nemotron_config(pattern, sizes)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    drawn = _Drawn(torch.Generator(device).manual_seed(0), dtype)
    weights = {
        "backbone.embeddings.weight": drawn.normal(sizes.vocab, sizes.hidden, std=1.0),
        "backbone.norm_f.weight": drawn.near_one(sizes.hidden),
        "lm_head.weight": drawn.normal(sizes.vocab, sizes.hidden),
    }
    for number, letter in enumerate(pattern):
        prefix = f"backbone.layers.{number}."
        weights[prefix + "norm.weight"] = drawn.near_one(sizes.hidden)
        layer = _LAYERS[letter](sizes, drawn)
        weights |= {f"{prefix}mixer.{name}": tensor for name, tensor in layer.items()}
    save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})
    return folder


def caches_of(
    model: Model, grid: int, *, num_sequences: int, longest: int, device: torch.device | str
) -> LayerCaches:
    """Pools with two slots for each sequence, full of numbers but for the zero slot."""
    pages = num_sequences * -(-longest // grid)
    sizes = PoolSizes(
        sequences=num_sequences,
        state_slots=1 + 2 * num_sequences,
        tail_pages=num_sequences,
        kv_pages=pages,
        kv_page_tokens=grid,
        state_slot_bytes=0,
        tail_page_bytes=0,
        kv_page_bytes=0,
    )
    pools = build_pools(
        model.state_geometry,
        model.kv_geometry,
        sizes,
        grid=grid,
        dtype=model.dtype,
        device=device,
    )
    generator = torch.Generator().manual_seed(7)

    def fill(tensor: torch.Tensor, scale: float = 1.0) -> None:
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale)

    for state in pools.states.layers:
        for tensor in (state.ssm_state[1:], state.conv_state[1:], state.tail_xBC):
            fill(tensor)
        fill(state.tail_x)
        fill(state.tail_B)
        state.tail_dt.copy_(torch.rand(state.tail_dt.shape, generator=generator) * 0.1)
    for kv in pools.kv.layers:
        fill(kv.keys)
        fill(kv.values)
    return LayerCaches(states=pools.states.layers, kv=pools.kv.layers)


@dataclass(frozen=True, slots=True)
class _Drawn:
    generator: torch.Generator
    dtype: torch.dtype

    def normal(self, *shape: int, std: float | None = None) -> torch.Tensor:
        scale = shape[-1] ** -0.5 if std is None else std
        return (self._randn(*shape) * scale).to(self.dtype)

    def near_one(self, size: int) -> torch.Tensor:
        return (1 + 0.1 * self._randn(size)).to(self.dtype)

    def uniform(self, size: int) -> torch.Tensor:
        return torch.rand(size, generator=self.generator, device=self.generator.device)

    def _randn(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator, device=self.generator.device)


def _mamba(sizes: Sizes, drawn: _Drawn) -> dict[str, torch.Tensor]:
    heads, inner = sizes.nheads, sizes.nheads * sizes.headdim
    conv_dim = inner + 2 * sizes.ngroups * sizes.dstate
    dt = torch.exp(drawn.uniform(heads) * math.log(100) + math.log(0.001))
    return {
        "in_proj.weight": drawn.normal(inner + conv_dim + heads, sizes.hidden),
        "conv1d.weight": drawn.normal(conv_dim, 1, 4, std=0.4),
        "conv1d.bias": drawn.normal(conv_dim, std=0.1),
        "A_log": torch.log(1 + 15 * drawn.uniform(heads)),
        "D": drawn.near_one(heads),
        "dt_bias": dt + torch.log(-torch.expm1(-dt)),
        "norm.weight": drawn.near_one(inner),
        "out_proj.weight": drawn.normal(sizes.hidden, inner),
    }


def _attention(sizes: Sizes, drawn: _Drawn) -> dict[str, torch.Tensor]:
    q = sizes.attention_heads * sizes.attention_head_dim
    kv = sizes.kv_heads * sizes.attention_head_dim
    return {
        "q_proj.weight": drawn.normal(q, sizes.hidden),
        "k_proj.weight": drawn.normal(kv, sizes.hidden),
        "v_proj.weight": drawn.normal(kv, sizes.hidden),
        "o_proj.weight": drawn.normal(sizes.hidden, q),
    }


def _mlp(sizes: Sizes, drawn: _Drawn) -> dict[str, torch.Tensor]:
    return {
        "up_proj.weight": drawn.normal(sizes.intermediate, sizes.hidden),
        "down_proj.weight": drawn.normal(sizes.hidden, sizes.intermediate),
    }


def _experts(sizes: Sizes, drawn: _Drawn) -> dict[str, torch.Tensor]:
    weights = {
        "gate.weight": drawn.normal(4, sizes.hidden),
        "gate.e_score_correction_bias": drawn.normal(4, std=0.1),
    }
    for place in ("shared_experts", *(f"experts.{number}" for number in range(4))):
        weights |= {f"{place}.{name}": t for name, t in _mlp(sizes, drawn).items()}
    return weights


_LAYERS = {"M": _mamba, "*": _attention, "-": _mlp, "E": _experts}


def _mamba2_config(pattern: str, sizes: Sizes) -> dict[str, Any]:
    return {
        "architectures": ["Mamba2ForCausalLM"],
        "vocab_size": sizes.vocab,
        "hidden_size": sizes.hidden,
        "num_hidden_layers": len(pattern),
        "num_heads": sizes.nheads,
        "head_dim": sizes.headdim,
        "state_size": sizes.dstate,
        "n_groups": sizes.ngroups,
        "chunk_size": 64,
        "tie_word_embeddings": False,
        "eos_token_id": EOS_ID,
    }


def _nemotron_config(pattern: str, sizes: Sizes) -> dict[str, Any]:
    return {
        "architectures": ["NemotronHForCausalLM"],
        "vocab_size": sizes.vocab,
        "hidden_size": sizes.hidden,
        "hybrid_override_pattern": pattern,
        "mamba_num_heads": sizes.nheads,
        "mamba_head_dim": sizes.headdim,
        "ssm_state_size": sizes.dstate,
        "n_groups": sizes.ngroups,
        "num_attention_heads": sizes.attention_heads,
        "num_key_value_heads": sizes.kv_heads,
        "head_dim": sizes.attention_head_dim,
        "intermediate_size": sizes.intermediate,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": sizes.intermediate,
        "moe_shared_expert_intermediate_size": sizes.intermediate,
        "chunk_size": 64,
        "tie_word_embeddings": False,
        "eos_token_id": EOS_ID,
    }
