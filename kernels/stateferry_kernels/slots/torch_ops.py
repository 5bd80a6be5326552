"""Slot operations in torch operations. On a GPU they wait for the device to learn how many entries
are not padding; the Triton ones do not."""

from __future__ import annotations

import torch

from stateferry_kernels.layer_state import PAD_SLOT
from stateferry_kernels.slots.checks import check_indices, check_pools, check_steps


def copy_slots(
    ssm_state: torch.Tensor,
    conv_state: torch.Tensor,
    *,
    src_slots: torch.Tensor,
    dst_slots: torch.Tensor,
) -> None:
    """Copy whole states, all layers, to the byte.

    Args:     ssm_state (num_slots, num_layers, nheads, headdim, dstate) and conv_state (num_slots,
              num_layers, conv_dim, d_conv - 1), contiguous per slot; src_slots and dst_slots (n,)
              int32 or int64. Where either is PAD_SLOT the entry is skipped. No slot may be written
              that is read or written by another entry.
    Mutates:  ssm_state and conv_state at dst_slots.
    Raises:   TypeError, ValueError on a mismatch; slots are on the device and nobody checks them.
    """
    check_pools(ssm_state, conv_state)
    check_indices(src_slots=src_slots, dst_slots=dst_slots)
    src, dst = _live(src_slots, dst_slots)
    for pool in (ssm_state, conv_state):
        pool[dst] = pool[src]


def clear_slots(
    ssm_state: torch.Tensor, conv_state: torch.Tensor, *, state_slots: torch.Tensor
) -> None:
    """Fill whole states with zeros. Arguments and errors as in ``copy_slots``.

    Mutates:  ssm_state and conv_state at state_slots, PAD_SLOT left out.
    """
    check_pools(ssm_state, conv_state)
    check_indices(state_slots=state_slots)
    (slots,) = _live(state_slots)
    for pool in (ssm_state, conv_state):
        pool[slots] = 0


def scatter_steps(
    ssm_state: torch.Tensor,
    conv_state: torch.Tensor,
    *,
    step_states: torch.Tensor,
    step_windows: torch.Tensor,
    step_rows: torch.Tensor,
    steps: torch.Tensor,
    dst_slots: torch.Tensor,
) -> None:
    """After a verify that kept the state after each of its steps: put those of the accepted steps
    where the sequences' states belong.

    Args:     pools and dst_slots as in ``copy_slots``; step_states (rows, num_layers, num_steps,
              nheads, headdim, dstate) and step_windows (rows, num_layers, num_steps, conv_dim,
              d_conv - 1), contiguous per row, in the pools' dtypes; step_rows and steps (n,): entry
              i takes row step_rows[i] after step steps[i]. One row may serve several entries.
              Where any of the three is -1 the entry is skipped.
    Mutates:  ssm_state and conv_state at dst_slots.
    Raises:   TypeError, ValueError on a mismatch.
    """
    check_pools(ssm_state, conv_state)
    check_steps(ssm_state, conv_state, step_states, step_windows)
    check_indices(step_rows=step_rows, steps=steps, dst_slots=dst_slots)
    rows, step, dst = _live(step_rows, steps, dst_slots)
    ssm_state[dst] = step_states[rows, :, step]
    conv_state[dst] = step_windows[rows, :, step]


def _live(*indices: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The entries in which no index is PAD_SLOT."""
    table = torch.stack([tensor.long() for tensor in indices])
    return table[:, (table != PAD_SLOT).all(0)].unbind()
