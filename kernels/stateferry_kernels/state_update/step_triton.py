# mypy: allow-untyped-calls
"""Host entries of the plain step in Triton; same arguments as those of step_torch.py.

Two that differ: the rows of x, dt, B, C, z that are not contiguous are copied first, and
``rounding_seed`` asks for states of 16 bits to be rounded at random.
"""

from __future__ import annotations

import math

import torch
import triton

from stateferry_kernels.layer_state import SsmLayerParams
from stateferry_kernels.state_update.step_checks import (
    check_step_inputs,
    check_step_states,
    check_tied,
    check_untied,
)
from stateferry_kernels.state_update.step_kernels import (
    state_step_kernel,
    state_step_untied_kernel,
    state_steps_kernel,
)
from stateferry_kernels.state_update.step_tiles import step_tile


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
    rounding_seed: int | None = None,
) -> None:
    """One token per sequence: s = exp(dt A) s + dt x B, y = C . s + D x, times silu(z) if given.

    Args:     x, z (num_seqs, nheads, headdim); dt (num_seqs, nheads) raw; B and C (num_seqs,
              ngroups, dstate); state_slots (num_seqs,) int32 or int64, no live slot twice;
              rounding_seed: round a bf16 or fp16 state up or down with the chance that keeps its
              mean, by random bits of (seed, slot, element). None rounds to the nearest.
    Mutates:  out like x; ssm_state (num_slots, nheads, headdim, dstate) at the rows' slots. A row
              with PAD_SLOT reads and writes nothing.
    Raises:   TypeError, ValueError on a mismatch, or on a seed for fp32 states.
    Precision: fp32 throughout, stored as the destination's dtype: fp32, bf16 or fp16. out is of the
              state before it is rounded.
    """
    check_step_inputs(ssm_state, x, dt, B, C, z, out, state_slots)
    check_tied(params, ssm_state)
    _check_seed(rounding_seed, ssm_state)
    _check_packed(out, 1)
    if not x.numel():
        return
    x, dt, B, C = (_packed(tensor, 1) for tensor in (x, dt, B, C))
    z = None if z is None else _packed(z, 1)
    sizes, grid, num_warps = _launch(ssm_state, B, len(x))
    state_step_kernel[grid](
        ssm_state,
        x,
        dt,
        B,
        C,
        z,
        out,
        params.A,
        params.D,
        params.dt_bias,
        state_slots,
        ssm_state.stride(0),
        x.stride(0),
        dt.stride(0),
        B.stride(0),
        C.stride(0),
        0 if z is None else z.stride(0),
        out.stride(0),
        *params.dt_limit,
        rounding_seed,
        **sizes,
        SOFTPLUS=params.dt_softplus,
        num_warps=num_warps,
    )


def state_step_untied(
    ssm_state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    *,
    A: torch.Tensor,
    D: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = False,
    state_slots: torch.Tensor,
    out: torch.Tensor,
    z: torch.Tensor | None = None,
    rounding_seed: int | None = None,
) -> None:
    """``state_step`` where every channel has parameters of its own, as in Mamba-1.

    Args:     dt like x, raw; A (nheads, headdim, dstate), D and dt_bias (nheads, headdim), fp32;
              all four of any strides, 0 too. All else, and what is mutated and raised, as in
              ``state_step``.
    """
    check_step_inputs(ssm_state, x, dt, B, C, z, out, state_slots, dt_per_channel=True)
    check_untied(A, D, dt_bias, ssm_state)
    _check_seed(rounding_seed, ssm_state)
    _check_packed(out, 1)
    if not x.numel():
        return
    x, B, C = (_packed(tensor, 1) for tensor in (x, B, C))
    z = None if z is None else _packed(z, 1)
    sizes, grid, num_warps = _launch(ssm_state, B, len(x))
    state_step_untied_kernel[grid](
        ssm_state,
        x,
        dt,
        B,
        C,
        z,
        out,
        A,
        D,
        dt_bias,
        state_slots,
        ssm_state.stride(0),
        x.stride(0),
        *dt.stride(),
        B.stride(0),
        C.stride(0),
        0 if z is None else z.stride(0),
        out.stride(0),
        *A.stride(),
        *((0, 0) if D is None else D.stride()),
        *((0, 0) if dt_bias is None else dt_bias.stride()),
        rounding_seed,
        **sizes,
        SOFTPLUS=dt_softplus,
        num_warps=num_warps,
    )


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
    rounding_seed: int | None = None,
) -> None:
    """``state_step`` for num_steps tokens of each sequence, one after the other in one launch.

    Args:     as in ``state_step`` with num_steps as the second dimension of x, dt, B, C, z and out;
              step_states (rows, at least num_steps, nheads, headdim, dstate) fp32, bf16 or fp16,
              step_slots (num_seqs,) its row for each sequence, ``state_slots`` by default;
              parents (num_seqs, num_steps): step t > 0 starts from the state after step
              ``parents[i, t]`` as it was stored in step_states, or from the sequence's own where
              that is -1. Without parents, step t starts from the unrounded state after step t - 1.
    Mutates:  out; step_states[step_slots[i], t] = the state after step t, to the nearest;
              ssm_state = the state after the last step, if ``write_state``. A row with PAD_SLOT
              reads and writes nothing; one with PAD_SLOT in step_slots keeps no step and is a
              chain.
    Raises:   TypeError, ValueError on a mismatch, on parents or step_slots without step_states.
    """
    check_step_states(x, ssm_state, step_states, step_slots, parents)
    num_seqs, num_steps = x.shape[:2]
    check_step_inputs(ssm_state, x, dt, B, C, z, out, state_slots, num_steps=num_steps)
    check_tied(params, ssm_state)
    _check_seed(rounding_seed, ssm_state)
    _check_packed(out, 2)
    if not x.numel():
        return
    x, dt, B, C = (_packed(tensor, 2) for tensor in (x, dt, B, C))
    z = None if z is None else _packed(z, 2)
    parents = None if parents is None else _packed(parents, 1)
    sizes, grid, num_warps = _launch(ssm_state, B, num_seqs)
    state_steps_kernel[grid](
        ssm_state,
        x,
        dt,
        B,
        C,
        z,
        out,
        params.A,
        params.D,
        params.dt_bias,
        state_slots,
        step_states,
        state_slots if step_slots is None else step_slots,
        parents,
        ssm_state.stride(0),
        *x.stride()[:2],
        *dt.stride()[:2],
        *B.stride()[:2],
        *C.stride()[:2],
        *((0, 0) if z is None else z.stride()[:2]),
        *out.stride()[:2],
        0 if step_states is None else step_states.stride(0),
        0 if parents is None else parents.stride(0),
        *params.dt_limit,
        rounding_seed,
        num_steps,
        **sizes,
        SOFTPLUS=params.dt_softplus,
        WRITE_STATE=write_state,
        num_warps=num_warps,
    )


def _launch(
    ssm_state: torch.Tensor, B: torch.Tensor, num_seqs: int
) -> tuple[dict[str, int], tuple[int], int]:
    """The kernels' sizes, the launch grid and the number of warps."""
    _, nheads, headdim, dstate = ssm_state.shape
    tile = step_tile(ssm_state.element_size(), headdim, dstate, num_seqs * nheads)
    block_m = min(tile.block_rows, triton.next_power_of_2(headdim))
    sizes = {
        "NHEADS": nheads,
        "HEADDIM": headdim,
        "DSTATE": dstate,
        "PER_GROUP": nheads // B.shape[-2],
        "BLOCK_M": block_m,
        # Eight elements share a draw of random bits.
        "BLOCK_N": max(8, triton.next_power_of_2(dstate)),
    }
    return sizes, (num_seqs * nheads * math.ceil(headdim / block_m),), tile.num_warps


def _check_seed(rounding_seed: int | None, ssm_state: torch.Tensor) -> None:
    if rounding_seed is not None and ssm_state.dtype == torch.float32:
        raise ValueError("rounding_seed: a state of fp32 is not rounded")


def _is_packed(tensor: torch.Tensor, lead: int) -> bool:
    """Whether all dimensions after the first ``lead`` are contiguous."""
    expected = 1
    for size, stride in zip(
        tensor.shape[: lead - 1 : -1], tensor.stride()[: lead - 1 : -1], strict=True
    ):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _packed(tensor: torch.Tensor, lead: int) -> torch.Tensor:
    return tensor if _is_packed(tensor, lead) else tensor.contiguous()


def _check_packed(out: torch.Tensor, lead: int) -> None:
    if not _is_packed(out, lead):
        raise ValueError("out: a row of heads must be contiguous")
