"""The plain step on the CPU: native/src/step.h. Arguments as in ``state_update.step_torch``.

What the library does not hold (fp16, per-step states of another dtype than the state) goes to the
torch operations.
"""

from __future__ import annotations

import torch

from stateferry_kernels.layer_state import ACTIVATION_DTYPES, STATE_DTYPES, SsmLayerParams
from stateferry_kernels.native.arguments import Rows, look_of, pack_rows, params_struct
from stateferry_kernels.native.library import native
from stateferry_kernels.native.structs import DTYPE_CODES, STEPS
from stateferry_kernels.state_update import step_torch
from stateferry_kernels.state_update.step_checks import (
    check_step_inputs,
    check_step_states,
    check_tied,
)

_KEY = "native state_step"

# As native/src/step.h counts them.
_FAULTS = {1: "state_slots", 2: "step_slots", 3: "parents"}


def state_step(
    ssm_state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    *,
    params: SsmLayerParams,
    state_slots: torch.Tensor,
    out: torch.Tensor,
    z: torch.Tensor | None = None,
) -> None:
    """One token per sequence: the whole state is read and written."""
    # Layer after layer the arguments look alike: checked once, they are only compared.
    look = look_of(ssm_state, x, dt, B, C, out, state_slots, *(() if z is None else (z,)))
    known = params.cache.get(_KEY)
    if known is None or known[0] != look:
        known = _checked(look, ssm_state, x, dt, B, C, z, out, state_slots, params)
        if known is None:
            step_torch.state_step(
                ssm_state, x, dt, B, C, params=params, state_slots=state_slots, out=out, z=z
            )
            return
    _, strides, sizes = known
    if strides is None:
        _run(Rows(x, dt, B, C, z, out), ssm_state, B, params, _int32(state_slots))
        return
    num_sequences, num_slots, ssm_stride = sizes[:3]
    steps = STEPS.pack(
        *(num_sequences, 1, num_slots, 0, state_slots.data_ptr(), ssm_state.data_ptr()),
        *(ssm_stride, *sizes[3:], 0, 0, 0, 0, 1),
    )
    _call(steps, params, pack_rows(strides, x, dt, B, C, z, out))


def _checked(
    look: list[object],
    ssm_state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    z: torch.Tensor | None,
    out: torch.Tensor,
    state_slots: torch.Tensor,
    params: SsmLayerParams,
) -> tuple[list[object], tuple[int, ...] | None, tuple[int, ...]] | None:
    """What calls that look like this one have in common, kept with the layer: the look, the rows'
    strides (None where something must be copied) and the sizes. None: not for the library."""
    if not _held(ssm_state, x, dt):
        return None
    check_step_inputs(ssm_state, x, dt, B, C, z, out, state_slots)
    check_tied(params, ssm_state)
    rows = Rows(x, dt, B, C, z, out)
    ready = not rows.copied and _int32(state_slots) is state_slots
    dtypes = (rows.dtype_code, DTYPE_CODES[ssm_state.dtype])
    pool = (ssm_state.shape[0], ssm_state.stride(0), *ssm_state.shape[1:])
    known = (look, rows.strides if ready else None, (len(x), *pool, B.shape[1], *dtypes))
    params.cache[_KEY] = known
    return known


def state_steps(
    ssm_state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    *,
    params: SsmLayerParams,
    state_slots: torch.Tensor,
    out: torch.Tensor,
    z: torch.Tensor | None = None,
    step_states: torch.Tensor | None = None,
    step_slots: torch.Tensor | None = None,
    parents: torch.Tensor | None = None,
    write_state: bool = True,
) -> None:
    """Some tokens of each sequence, one after the other or as a tree, keeping every state."""
    fits = step_states is None or (
        step_states.dtype == ssm_state.dtype
        and (not len(step_states) or step_states[0].is_contiguous())
    )
    if not (_held(ssm_state, x, dt) and fits and out.is_contiguous()):
        step_torch.state_steps(
            *(ssm_state, x, dt, B, C),
            params=params,
            state_slots=state_slots,
            out=out,
            z=z,
            step_states=step_states,
            step_slots=step_slots,
            parents=parents,
            write_state=write_state,
        )
        return
    check_step_states(x, ssm_state, step_states, step_slots, parents)
    check_step_inputs(ssm_state, x, dt, B, C, z, out, state_slots, num_steps=x.shape[1])
    check_tied(params, ssm_state)
    flat_z = None if z is None else z.flatten(0, 1)
    flat_x, flat_dt, flat_B, flat_C = (t.flatten(0, 1) for t in (x, dt, B, C))
    rows = Rows(flat_x, flat_dt, flat_B, flat_C, flat_z, out.view(-1, *out.shape[2:]))
    slots = _int32(state_slots)
    _run(
        rows,
        ssm_state,
        B[:, 0],
        params,
        slots,
        num_steps=x.shape[1],
        step_states=step_states,
        step_slots=slots if step_slots is None else _int32(step_slots),
        parents=None if parents is None else _int32(parents),
        write_state=write_state,
    )


def _held(ssm_state: torch.Tensor, x: torch.Tensor, dt: torch.Tensor) -> bool:
    """Whether the library has these dtypes and this layout."""
    return (
        ssm_state.dtype in STATE_DTYPES
        and x.dtype in ACTIVATION_DTYPES
        and dt.dtype in ACTIVATION_DTYPES
        and (not len(ssm_state) or ssm_state[0].is_contiguous())
    )


def _run(
    rows: Rows,
    ssm_state: torch.Tensor,
    B: torch.Tensor,
    params: SsmLayerParams,
    state_slots: torch.Tensor,
    *,
    num_steps: int = 1,
    step_states: torch.Tensor | None = None,
    step_slots: torch.Tensor | None = None,
    parents: torch.Tensor | None = None,
    write_state: bool = True,
) -> None:
    def address(tensor: torch.Tensor | None) -> int:
        return 0 if tensor is None else tensor.data_ptr()

    steps = STEPS.pack(
        len(state_slots),
        num_steps,
        ssm_state.shape[0],
        0 if step_states is None else step_states.shape[0],
        state_slots.data_ptr(),
        ssm_state.data_ptr(),
        ssm_state.stride(0),
        *ssm_state.shape[1:],
        B.shape[1],
        rows.dtype_code,
        DTYPE_CODES[ssm_state.dtype],
        address(step_states),
        0 if step_states is None else step_states.stride(0),
        address(step_slots),
        address(parents),
        int(write_state),
    )
    _call(steps, params, rows.struct)


def _call(steps: bytes, params: SsmLayerParams, rows: bytes) -> None:
    fault = native().state_steps(steps, params_struct(params), rows, torch.get_num_threads())
    if fault:
        raise ValueError(f"{_FAULTS[fault]}: a number that is out of range")


def _int32(numbers: torch.Tensor) -> torch.Tensor:
    fine = numbers.dtype is torch.int32 and numbers.is_contiguous()
    return numbers if fine else numbers.int().contiguous()
