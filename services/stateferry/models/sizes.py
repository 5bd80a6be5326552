"""Sizes and options of the layers that the architectures share."""

from __future__ import annotations

from dataclasses import dataclass

from stateferry.core.errors import ModelError
from stateferry_kernels.kv_layer import KvGeometry
from stateferry_kernels.layer_state import StateGeometry


@dataclass(frozen=True, slots=True)
class MixerSizes:
    """A Mamba-2 mixer; all of a model's are alike."""

    nheads: int
    headdim: int
    dstate: int
    ngroups: int
    d_conv: int
    dt_limit: tuple[float, float]
    in_bias: bool
    out_bias: bool
    conv_bias: bool
    norm_eps: float

    def __post_init__(self) -> None:
        if self.nheads % self.ngroups:
            raise ModelError(f"n_groups {self.ngroups} does not divide {self.nheads} Mamba-2 heads")

    @property
    def d_inner(self) -> int:
        return self.nheads * self.headdim

    @property
    def bc_dim(self) -> int:
        """Features of B, and of C."""
        return self.ngroups * self.dstate

    @property
    def conv_dim(self) -> int:
        return self.d_inner + 2 * self.bc_dim

    @property
    def projected(self) -> int:
        """Features of zxbcdt."""
        return self.d_inner + self.conv_dim + self.nheads

    @property
    def group_size(self) -> int:
        """Features that the gated norm takes together."""
        return self.d_inner // self.ngroups

    def state_geometry(self, num_layers: int) -> StateGeometry:
        """What a state pool needs to know."""
        return StateGeometry(
            num_layers=num_layers,
            nheads=self.nheads,
            headdim=self.headdim,
            dstate=self.dstate,
            ngroups=self.ngroups,
            d_conv=self.d_conv,
            conv_dim=self.conv_dim,
        )


@dataclass(frozen=True, slots=True)
class AttentionSizes:
    """A grouped-query attention layer; all of a model's are alike."""

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    bias: bool

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ModelError(
                f"num_key_value_heads {self.kv_heads} does not divide "
                f"num_attention_heads {self.heads}"
            )

    @property
    def all_heads(self) -> int:
        """Heads of q, k and v together."""
        return self.heads + 2 * self.kv_heads

    @property
    def q_dim(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_dim(self) -> int:
        """Features of k, and of v."""
        return self.kv_heads * self.head_dim

    @property
    def projected(self) -> int:
        """Features of q, k and v together."""
        return self.q_dim + 2 * self.kv_dim

    def kv_geometry(self, num_layers: int) -> KvGeometry:
        """What a KV pool needs to know."""
        return KvGeometry(num_layers=num_layers, kv_heads=self.kv_heads, head_dim=self.head_dim)


NO_KV = KvGeometry(num_layers=0, kv_heads=1, head_dim=1)
