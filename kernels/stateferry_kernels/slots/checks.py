"""Checks of the slot operations' host entries."""

from __future__ import annotations

import torch

from stateferry_kernels.guards import check_pool, check_tensor
from stateferry_kernels.layer_state import ACTIVATION_DTYPES

_STATE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_INDEX_DTYPES = (torch.int32, torch.int64)


def check_pools(ssm_state: torch.Tensor, conv_state: torch.Tensor) -> None:
    """Raises TypeError or ValueError unless ssm_state is (num_slots, num_layers, nheads, headdim,
    dstate) and conv_state (num_slots, num_layers, conv_dim, d_conv - 1), contiguous per slot."""
    for name, pool, dimensions in (("ssm_state", ssm_state, 5), ("conv_state", conv_state, 4)):
        if pool.dim() != dimensions:
            raise ValueError(f"{name}: {pool.dim()} dimensions, expected {dimensions}")
        check_pool(name, pool)
    check_tensor("ssm_state", ssm_state, tuple(ssm_state.shape), _STATE_DTYPES)
    shape = (*ssm_state.shape[:2], *conv_state.shape[2:])
    check_tensor("conv_state", conv_state, shape, (*ACTIVATION_DTYPES, torch.float16))


def check_steps(
    ssm_state: torch.Tensor,
    conv_state: torch.Tensor,
    step_states: torch.Tensor,
    step_windows: torch.Tensor,
) -> None:
    """Raises TypeError or ValueError unless step_states and step_windows are those pools with their
    own number of rows, and a dimension of steps after that of the layers."""
    steps = (("step_states", step_states, ssm_state), ("step_windows", step_windows, conv_state))
    for name, kept, pool in steps:
        if kept.dim() != pool.dim() + 1:
            raise ValueError(f"{name}: {kept.dim()} dimensions, expected {pool.dim() + 1}")
        shape = (kept.shape[0], pool.shape[1], kept.shape[2], *pool.shape[2:])
        check_tensor(name, kept, shape, (pool.dtype,))
        check_pool(name, kept)
    if step_states.shape[:3] != step_windows.shape[:3]:
        raise ValueError(
            f"step_windows: rows, layers and steps {tuple(step_windows.shape[:3])}, expected those "
            f"of step_states, {tuple(step_states.shape[:3])}"
        )


def check_indices(**indices: torch.Tensor) -> None:
    """Raises TypeError or ValueError unless all are (n,) of integers, with one n."""
    length = len(next(iter(indices.values())))
    for name, tensor in indices.items():
        check_tensor(name, tensor, (length,), _INDEX_DTYPES)
