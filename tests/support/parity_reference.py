"""What the parity entries compute, written down from the definitions alone, in fp64.

Nothing here comes from stateferry_kernels: names and shapes are mamba_ssm's and causal_conv1d's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}


def assert_close(got: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    """||got - expected|| / ||expected|| below what ``dtype`` allows."""
    assert got.shape == expected.shape
    got, expected = got.double(), expected.double()
    assert torch.isfinite(got).all()
    error = (got - expected).norm() / expected.norm().clamp(min=1e-30)
    assert error < TOLERANCE[dtype], f"relative error {float(error):.2e}"


def silu(x: torch.Tensor) -> torch.Tensor:
    return x / (1 + torch.exp(-x))


def softplus(x: torch.Tensor) -> torch.Tensor:
    return torch.logaddexp(x, torch.zeros_like(x))


@dataclass(frozen=True)
class Scan:
    """y like x, and states[t] (nheads, headdim, dstate) after t tokens."""

    y: torch.Tensor
    states: list[torch.Tensor]


def scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    *,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    initial_state: torch.Tensor | None = None,
) -> Scan:
    """One sequence: x (seqlen, nheads, headdim), dt (seqlen, nheads), A (nheads,), B and C
    (seqlen, ngroups, dstate), D (nheads,) or (nheads, headdim)."""
    x, dt, A, B, C = (tensor.double() for tensor in (x, dt, A, B, C))
    nheads, headdim = x.shape[1:]
    group_of_head = torch.arange(nheads) // (nheads // B.shape[1])
    B, C = B[:, group_of_head], C[:, group_of_head]
    if dt_bias is not None:
        dt = dt + dt_bias.double()
    if dt_softplus:
        dt = softplus(dt)
    dt = dt.clamp(*dt_limit)
    decay = torch.exp(dt * A)[..., None, None]
    added = (dt[..., None] * x)[..., None] * B[:, :, None, :]
    state = x.new_zeros(nheads, headdim, B.shape[2])
    states = [state if initial_state is None else initial_state.double()]
    for t in range(len(x)):
        states.append(states[-1] * decay[t] + added[t])
    y = torch.zeros_like(x)
    for t in range(len(x)):
        y[t] = (states[t + 1] * C[t, :, None, :]).sum(-1)
    if D is not None:
        y = y + (D.double()[:, None] if D.dim() == 1 else D.double()) * x
    if z is not None:
        y = y * silu(z.double())
    return Scan(y, states)


def step(
    state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    *,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token for some sequences: state (batch, nheads, dim, dstate), x, dt and z (batch, nheads,
    dim), A (nheads, dim, dstate), B and C (batch, ngroups, dstate), D and dt_bias (nheads, dim).
    Returns y and the new state."""
    state, x, dt, A, B, C = (tensor.double() for tensor in (state, x, dt, A, B, C))
    group_of_head = torch.arange(x.shape[1]) // (x.shape[1] // B.shape[1])
    B, C = B[:, group_of_head], C[:, group_of_head]
    if dt_bias is not None:
        dt = dt + dt_bias.double()
    if dt_softplus:
        dt = softplus(dt)
    state = torch.exp(dt[..., None] * A) * state + (dt * x)[..., None] * B[:, :, None]
    y = torch.einsum("bhpn,bhn->bhp", state, C)
    if D is not None:
        y = y + D.double() * x
    if z is not None:
        y = y * silu(z.double())
    return y, state


def conv(
    columns: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str | None
) -> torch.Tensor:
    """The outputs of all but the first width - 1 of columns (dim, width - 1 + seqlen)."""
    width = weight.shape[1]
    windows = columns.double().unfold(1, width, 1)  # (dim, seqlen, width)
    y = (windows * weight.double()[:, None]).sum(-1)
    if bias is not None:
        y = y + bias.double()[:, None]
    return y if activation is None else silu(y)
