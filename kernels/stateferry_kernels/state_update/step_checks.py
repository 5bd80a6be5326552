"""Checks of the plain step's host entries; see guards.py for those in grid form."""

from __future__ import annotations

import torch

from stateferry_kernels.guards import check_params, check_pool, check_tensor
from stateferry_kernels.layer_state import SsmLayerParams

STEP_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_SLOT_DTYPES = (torch.int32, torch.int64)


def check_step_inputs(
    ssm_state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    z: torch.Tensor | None,
    out: torch.Tensor,
    state_slots: torch.Tensor,
    *,
    num_steps: int | None = None,
    dt_per_channel: bool = False,
) -> None:
    """Raises TypeError or ValueError unless all fit each other: ssm_state (num_slots, nheads,
    headdim, dstate); x, z and out (num_seqs, nheads, headdim); dt (num_seqs, nheads), or like x
    when ``dt_per_channel``; B and C (num_seqs, ngroups, dstate); state_slots (num_seqs,). All but
    the first and the last have ``num_steps`` as their second dimension when that is given.

    The slots' values stay on the device: nobody checks them.
    """
    lead = 1 if num_steps is None else 2
    if ssm_state.dim() != 4:
        raise ValueError(f"ssm_state: {ssm_state.dim()} dimensions, expected 4")
    if B.dim() != lead + 2 or not B.shape[lead]:
        raise ValueError(f"B: shape {tuple(B.shape)}, expected {lead + 2} dimensions, none of 0")
    _, nheads, headdim, dstate = ssm_state.shape
    ngroups = B.shape[lead]
    rows = (len(x),) if num_steps is None else (len(x), num_steps)
    dtypes = (x.dtype,)
    check_tensor("ssm_state", ssm_state, tuple(ssm_state.shape), STEP_DTYPES)
    check_tensor("x", x, (*rows, nheads, headdim), STEP_DTYPES)
    check_tensor(
        "dt", dt, (*rows, nheads, headdim) if dt_per_channel else (*rows, nheads), STEP_DTYPES
    )
    check_tensor("B", B, (*rows, ngroups, dstate), dtypes)
    check_tensor("C", C, (*rows, ngroups, dstate), dtypes)
    check_tensor("out", out, (*rows, nheads, headdim), dtypes)
    if z is not None:
        check_tensor("z", z, (*rows, nheads, headdim), dtypes)
    check_tensor("state_slots", state_slots, (len(x),), _SLOT_DTYPES)
    check_pool("ssm_state", ssm_state)
    if nheads % ngroups:
        raise ValueError(f"{nheads} heads do not divide into {ngroups} groups")


def check_tied(params: SsmLayerParams, ssm_state: torch.Tensor) -> None:
    """Raises TypeError or ValueError on parameters of another layer's size."""
    check_params(params, ssm_state.shape[1])


def check_untied(
    A: torch.Tensor, D: torch.Tensor | None, dt_bias: torch.Tensor | None, ssm_state: torch.Tensor
) -> None:
    """Raises TypeError or ValueError unless A is (nheads, headdim, dstate) and D and dt_bias
    (nheads, headdim), all fp32."""
    _, nheads, headdim, dstate = ssm_state.shape
    check_tensor("A", A, (nheads, headdim, dstate), (torch.float32,))
    for name, tensor in (("D", D), ("dt_bias", dt_bias)):
        if tensor is not None:
            check_tensor(name, tensor, (nheads, headdim), (torch.float32,))


def check_step_states(
    x: torch.Tensor,
    ssm_state: torch.Tensor,
    step_states: torch.Tensor | None,
    step_slots: torch.Tensor | None,
    parents: torch.Tensor | None,
) -> None:
    """Raises TypeError or ValueError unless step_states is (rows, at least num_steps, nheads,
    headdim, dstate), step_slots (num_seqs,) and parents (num_seqs, num_steps)."""
    if x.dim() != 4:
        raise ValueError(f"x: {x.dim()} dimensions, expected 4")
    num_seqs, num_steps = x.shape[:2]
    if not num_steps:
        raise ValueError("x: no steps")
    if step_states is None:
        if step_slots is not None or parents is not None:
            raise ValueError("step_slots and parents need step_states")
        return
    if step_states.dim() != 5 or step_states.shape[1] < num_steps:
        raise ValueError(
            f"step_states: shape {tuple(step_states.shape)}, expected 5 dimensions with room for "
            f"{num_steps} steps"
        )
    shape = (*step_states.shape[:2], *ssm_state.shape[1:])
    check_tensor("step_states", step_states, shape, STEP_DTYPES)
    check_pool("step_states", step_states)
    if step_slots is not None:
        check_tensor("step_slots", step_slots, (num_seqs,), _SLOT_DTYPES)
    if parents is not None:
        check_tensor("parents", parents, (num_seqs, num_steps), _SLOT_DTYPES)
