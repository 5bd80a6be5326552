"""The shape of a model, and the shapes that are bundled."""

from __future__ import annotations

import dataclasses
from typing import Any

LAYER_TYPES = ("mamba2", "attention", "mlp")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Field names are those of transformers' Mamba2Config where it has them."""

    vocab_size: int = 4096
    hidden_size: int = 256
    layer_types: tuple[str, ...] = ("mamba2",) * 11
    expand: int = 2
    head_dim: int = 64
    state_size: int = 64
    n_groups: int = 1
    conv_kernel: int = 4
    chunk_size: int = 64
    # Step sizes dt are raised to this after the softplus; NemotronH has such a floor.
    time_step_min: float = 0.0
    attention_heads: int = 4
    kv_heads: int = 2
    mlp_size: int = 512
    # Whether the output matrix is the embedding matrix.
    tied: bool = True
    layer_norm_epsilon: float = 1e-5
    dropout: float = 0.0

    def __post_init__(self) -> None:
        """Refuse shapes that do not divide."""
        if self.intermediate_size % self.head_dim:
            raise ValueError("expand * hidden_size must be a multiple of head_dim")
        if self.num_heads % self.n_groups:
            raise ValueError("the number of heads must be a multiple of n_groups")
        if self.attention_heads % self.kv_heads:
            raise ValueError("attention_heads must be a multiple of kv_heads")
        unknown = set(self.layer_types) - set(LAYER_TYPES)
        if unknown:
            raise ValueError(f"unknown layer types {sorted(unknown)}; known: {sorted(LAYER_TYPES)}")

    @property
    def intermediate_size(self) -> int:
        """Channels inside a Mamba-2 mixer: num_heads * head_dim."""
        return self.expand * self.hidden_size

    @property
    def num_heads(self) -> int:
        """SSD heads per layer."""
        return self.intermediate_size // self.head_dim

    @property
    def conv_dim(self) -> int:
        """Channels of the short convolution: x, B and C."""
        return self.intermediate_size + 2 * self.n_groups * self.state_size


LETTERS = {"M": "mamba2", "*": "attention", "-": "mlp"}


def layers_of(pattern: str) -> tuple[str, ...]:
    """Layer types of a pattern in NemotronH's letters."""
    return tuple(LETTERS[letter] for letter in pattern)


# By the name of the model directory. The hybrid follows NemotronH: it begins with Mamba-2 and ends
# with an MLP, its two attention layers stand at even distances, each before an MLP, and its output
# matrix is its own (transformers ties none in this architecture).
BUNDLED = {
    "mamba2_english": ModelConfig(),
    "hybrid_english": ModelConfig(
        layer_types=layers_of("M-M*-M-M*-M-"), time_step_min=1e-4, tied=False
    ),
}


def config_from_dict(values: dict[str, Any]) -> ModelConfig:
    """Inverse of dataclasses.asdict after a trip through JSON."""
    return ModelConfig(**{**values, "layer_types": tuple(values["layer_types"])})
