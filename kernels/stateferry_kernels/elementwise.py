"""Activations whose bits depend on the element alone.

torch's own silu, sigmoid and softplus evaluate the last few elements of a tensor with other code
than the vectorised rest, and the two differ in the last bit (measured, torch 2.13 on x86-64), so a
token's value would depend on how many neighbours it has. exp, log1p and the arithmetic operations
do not have that fault.
"""

from __future__ import annotations

import torch

# Above this, softplus(x) == x in fp32.
_SOFTPLUS_LINEAR = 20.0


def silu(x: torch.Tensor) -> torch.Tensor:
    """x * sigmoid(x), any shape, fp32."""
    x = x.contiguous()
    return x / (1.0 + torch.exp(-x))


def softplus(x: torch.Tensor) -> torch.Tensor:
    """log(1 + exp(x)), any shape, fp32."""
    x = x.contiguous()
    return torch.where(x > _SOFTPLUS_LINEAR, x, torch.log1p(torch.exp(x)))
