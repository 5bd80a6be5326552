"""What a layer can do to the residual stream, with the parameter names transformers uses."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stateferry.bundled.recipe.config import ModelConfig
from stateferry.bundled.recipe.ssd import ssd_blocks


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


def start_small(projection: nn.Linear, config: ModelConfig) -> None:
    """Initialise a branch's last projection.

    Residual branches add up over depth, so each starts smaller in a deeper model.
    """
    spread = 1 / math.sqrt(projection.in_features * len(config.layer_types))
    nn.init.normal_(projection.weight, std=spread)


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
        start_small(self.out_proj, config)

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
        step = F.softplus(dt.to(wide) + self.dt_bias).clamp_min(config.time_step_min)
        log_decay = -step * torch.exp(self.A_log)
        y = ssd_blocks(x * step.to(x.dtype)[..., None], log_decay, b, c, config.chunk_size)
        y = y + self.D.to(y.dtype)[:, None] * x
        out: Tensor = self.out_proj(self.norm(y.flatten(2), z))
        return out


class Attention(nn.Module):
    """Causal grouped-query attention without positions: the Mamba-2 layers know the order."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        width, head_dim = config.hidden_size, config.head_dim
        heads, kv_heads = config.attention_heads, config.kv_heads
        self.q_proj = nn.Linear(width, heads * head_dim, bias=False)
        self.k_proj = nn.Linear(width, kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(width, kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(heads * head_dim, width, bias=False)
        start_small(self.o_proj, config)

    def forward(self, u: Tensor) -> Tensor:
        """u: (batch, length, hidden_size). Returns the same shape."""

        def heads(x: Tensor) -> Tensor:
            return x.reshape(*x.shape[:2], -1, self.config.head_dim).transpose(1, 2)

        y = F.scaled_dot_product_attention(
            heads(self.q_proj(u)),
            heads(self.k_proj(u)),
            heads(self.v_proj(u)),
            is_causal=True,
            enable_gqa=True,
        )
        out: Tensor = self.o_proj(y.transpose(1, 2).flatten(2))
        return out


class Relu2Mlp(nn.Module):
    """down(relu(up(u)) ** 2)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.mlp_size, bias=False)
        self.down_proj = nn.Linear(config.mlp_size, config.hidden_size, bias=False)
        start_small(self.down_proj, config)

    def forward(self, u: Tensor) -> Tensor:
        """u: (batch, length, hidden_size). Returns the same shape."""
        out: Tensor = self.down_proj(F.relu(self.up_proj(u)).square())
        return out


MIXERS: dict[str, type[Mamba2Mixer | Attention | Relu2Mlp]] = {
    "mamba2": Mamba2Mixer,
    "attention": Attention,
    "mlp": Relu2Mlp,
}
