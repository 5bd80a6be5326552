"""The language model in plain torch, with the parameter names transformers uses.

Same names means that export is a cast and a rename-free copy. A layer is `x + mixer(norm(x))`;
what a layer's mixer is comes from `ModelConfig.layer_types`, so that other kinds of layer can be
added to `MIXERS` without touching the rest.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stateferry.bundled.recipe.ssd import ssd_blocks


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape of the model; field names are those of transformers' Mamba2Config."""

    vocab_size: int = 4096
    hidden_size: int = 256
    layer_types: tuple[str, ...] = ("mamba2",) * 11
    expand: int = 2
    head_dim: int = 64
    state_size: int = 64
    n_groups: int = 1
    conv_kernel: int = 4
    chunk_size: int = 64
    layer_norm_epsilon: float = 1e-5
    dropout: float = 0.0

    def __post_init__(self) -> None:
        """Refuse shapes that do not divide."""
        if self.intermediate_size % self.head_dim:
            raise ValueError("expand * hidden_size must be a multiple of head_dim")
        if self.num_heads % self.n_groups:
            raise ValueError("the number of heads must be a multiple of n_groups")
        unknown = set(self.layer_types) - set(MIXERS)
        if unknown:
            raise ValueError(f"unknown layer types {sorted(unknown)}; known: {sorted(MIXERS)}")

    @property
    def intermediate_size(self) -> int:
        """Channels inside a mixer: num_heads * head_dim."""
        return self.expand * self.hidden_size

    @property
    def num_heads(self) -> int:
        """SSD heads per layer."""
        return self.intermediate_size // self.head_dim

    @property
    def conv_dim(self) -> int:
        """Channels of the short convolution: x, B and C."""
        return self.intermediate_size + 2 * self.n_groups * self.state_size


class RMSNorm(nn.Module):
    """Root mean square norm in float32; with a gate it normalises x * silu(gate).

    With groups, each of `ngroups` equal parts of the last dimension is normalised by itself.
    """

    def __init__(self, size: int, epsilon: float, ngroups: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.epsilon = epsilon
        self.ngroups = ngroups

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        """x, gate: (..., size) of any dtype. Returns at least float32."""
        wide = x if x.dtype == torch.float64 else x.float()
        if gate is not None:
            wide = wide * F.silu(gate.to(wide.dtype))
        parts = wide.reshape(*wide.shape[:-1], self.ngroups, -1)
        parts = parts * torch.rsqrt(parts.square().mean(-1, keepdim=True) + self.epsilon)
        return self.weight * parts.reshape(wide.shape)


class ShortConv(nn.Module):
    """Causal depthwise convolution over time followed by silu.

    Parameters have the shapes of a depthwise nn.Conv1d. The sum over four shifted copies is
    elementwise work, which a compiler fuses with its neighbours; a convolution call would not be.
    """

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(kernel)
        self.weight = nn.Parameter(torch.empty(channels, 1, kernel).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.kernel = kernel

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, length, channels). Returns the same shape and dtype."""
        length = x.shape[1]
        padded = F.pad(x, (0, 0, self.kernel - 1, 0))
        taps = self.weight[:, 0].to(x.dtype)
        y = self.bias.to(x.dtype).expand_as(x)
        for k in range(self.kernel):
            y = y + padded[:, k : k + length] * taps[:, k]
        return F.silu(y)


class Mamba2Mixer(nn.Module):
    """One Mamba-2 mixer: project, short convolution, SSD, gated norm, project back."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        width, heads = config.intermediate_size, config.num_heads
        self.in_proj = nn.Linear(config.hidden_size, width + config.conv_dim + heads, bias=False)
        self.conv1d = ShortConv(config.conv_dim, config.conv_kernel)
        # Step sizes start log-uniform in [1e-3, 0.1]: heads begin with memories of 10 to 1000
        # tokens. dt_bias is the inverse softplus of the step size.
        step = torch.exp(torch.empty(heads).uniform_(math.log(1e-3), math.log(1e-1)))
        self.dt_bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))
        self.A_log = nn.Parameter(torch.log(torch.arange(1, heads + 1, dtype=torch.float32)))
        self.D = nn.Parameter(torch.ones(heads))
        self.norm = RMSNorm(width, config.layer_norm_epsilon, config.n_groups)
        self.out_proj = nn.Linear(width, config.hidden_size, bias=False)
        # Residual branches add up over depth, so each starts smaller in a deeper model.
        spread = 1 / math.sqrt(width * len(config.layer_types))
        nn.init.normal_(self.out_proj.weight, std=spread)

    def forward(self, u: Tensor) -> Tensor:
        """u: (batch, length, hidden_size). Returns the same shape."""
        config = self.config
        batch, length, _ = u.shape
        z, xbc, dt = self.in_proj(u).split(
            [config.intermediate_size, config.conv_dim, config.num_heads], dim=-1
        )
        bc_size = config.n_groups * config.state_size
        x, b, c = self.conv1d(xbc).split([config.intermediate_size, bc_size, bc_size], dim=-1)
        x = x.reshape(batch, length, config.num_heads, config.head_dim)
        b = b.reshape(batch, length, config.n_groups, config.state_size)
        c = c.reshape(batch, length, config.n_groups, config.state_size)
        wide = self.dt_bias.dtype  # float32 in training: decays must not be rounded to bf16
        step = F.softplus(dt.to(wide) + self.dt_bias)
        log_decay = -step * torch.exp(self.A_log)
        y = ssd_blocks(x * step.to(x.dtype)[..., None], log_decay, b, c, config.chunk_size)
        y = y + self.D.to(y.dtype)[:, None] * x
        out: Tensor = self.out_proj(self.norm(y.flatten(2), z))
        return out


MIXERS: dict[str, type[Mamba2Mixer]] = {"mamba2": Mamba2Mixer}


class Layer(nn.Module):
    """x + dropout(mixer(norm(x)))."""

    def __init__(self, kind: str, config: ModelConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mixer = MIXERS[kind](config)
        self.dropout = config.dropout

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, length, hidden_size); the residual stream keeps its dtype."""
        branch = self.mixer(self.norm(x))
        return x + F.dropout(branch, self.dropout, self.training).to(x.dtype)


class Backbone(nn.Module):
    """Embedding, layers, final norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        nn.init.normal_(self.embeddings.weight, std=0.02)
        self.layers = nn.ModuleList(Layer(kind, config) for kind in config.layer_types)
        self.norm_f = RMSNorm(config.hidden_size, config.layer_norm_epsilon)

    def forward(self, ids: Tensor) -> Tensor:
        """ids: (batch, length) int64. Returns (batch, length, hidden_size)."""
        x = self.embeddings(ids)
        for layer in self.layers:
            x = layer(x)
        normed: Tensor = self.norm_f(x)
        return normed


class LanguageModel(nn.Module):
    """Next-token logits; the output matrix is the embedding matrix."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = Backbone(config)

    def forward(self, ids: Tensor) -> Tensor:
        """ids: (batch, length) int64. Returns logits (batch, length, vocab_size)."""
        return F.linear(self.backbone(ids), self.backbone.embeddings.weight)

    def loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Mean negative log likelihood in nats; ids and targets: (batch, length) int64."""
        logits = self(ids).float()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def config_from_dict(values: dict[str, Any]) -> ModelConfig:
    """Inverse of dataclasses.asdict after a trip through JSON."""
    return ModelConfig(**{**values, "layer_types": tuple(values["layer_types"])})
