"""``mamba_chunk_scan_combined`` with the arguments of mamba_ssm and of SGLang."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from stateferry_kernels.elementwise import silu
from stateferry_kernels.guards import check_tensor
from stateferry_kernels.layer_state import ACTIVATION_DTYPES, ZERO_SLOT, LayerState, SsmLayerParams
from stateferry_kernels.operations import Kernels
from stateferry_kernels.parity.host_lists import host_list, packed_offsets
from stateferry_kernels.parity.scan_plan import (
    ScanPlan,
    Stretch,
    plan_scan,
    stretches_of_packed,
    stretches_of_row,
)
from stateferry_kernels.parity.throwaway import default_kernels, scan_state

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@torch.no_grad()
def mamba_chunk_scan_combined(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    chunk_size: int,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    initial_states: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
    return_varlen_states: bool = False,
    *,
    return_intermediate_states: bool = False,
    state_dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
    chunk_indices: torch.Tensor | None = None,
    chunk_offsets: torch.Tensor | None = None,
    kernels: Kernels | None = None,
) -> torch.Tensor | tuple[torch.Tensor, ...] | None:
    """The scan of a batch of rows, forward only; mamba_ssm's up to ``return_varlen_states``, the
    others are SGLang's. fp32 arithmetic.

    Args:
        x, z: (batch, seqlen, nheads, headdim) fp32, bf16 or fp16.
        dt: (batch, seqlen, nheads) raw. A, dt_bias: (nheads,). D: (nheads,) or (nheads, headdim).
        B, C: (batch, seqlen, ngroups, dstate).
        chunk_size: any positive number, also where upstream wants a power of two.
        initial_states: (batch, nheads, headdim, dstate), or (num_seqs, ..) with cu_seqlens.
        seq_idx: (batch, seqlen). A sequence is a run of equal numbers; a row's initial state is
            that of its sequence 0. Not read when cu_seqlens is given.
        cu_seqlens: (num_seqs + 1,), for batch 1: where the packed sequences begin, and seqlen. It
            delimits them whether or not varlen states are asked for; a sequence may be empty.
        out: like x.
        state_dtype: of varlen and intermediate states, fp32 by default (upstream: C's dtype).
        chunk_indices, chunk_offsets: not read; they follow from cu_seqlens.

    Mutates: ``out``.
    Returns: mamba_ssm's convention without ``out``: y, or a tuple that begins with it. SGLang's
        with ``out``: the states alone, None without any. The states are, in this order:
        intermediate (batch, ceil(seqlen / chunk_size), nheads, headdim, dstate): the state before
            each chunk of a row, of the sequence whose token comes next. Where a sequence begins
            at the edge of a chunk, that is its initial state (upstream: the end of the one before).
        final (batch, nheads, headdim, dstate) fp32: at the end of each row.
        varlen (num_seqs, nheads, headdim, dstate): at the end of each packed sequence.
    Raises: TypeError, ValueError naming the argument.
    Host: cu_seqlens and seq_idx are read on the host; on a GPU, pass them as CPU tensors to spare a
        synchronisation.
    """
    _check(x, dt, A, B, C, D, z, dt_bias, chunk_size, out)
    if return_varlen_states and cu_seqlens is None:
        raise ValueError("return_varlen_states needs cu_seqlens")
    rows = _sequences(x, initial_states, seq_idx, cu_seqlens)
    _check_initial_states(initial_states, x, B, rows, cu_seqlens)
    plan = plan_scan(
        rows,
        x.shape[1],
        chunk_size,
        0 if initial_states is None else len(initial_states),
        every_edge=return_intermediate_states,
        end_states=return_final_states or return_varlen_states,
    )
    params = SsmLayerParams(
        A=A.float(),
        D=None if D is None else D.float(),
        dt_bias=None if dt_bias is None else dt_bias.float(),
        dt_softplus=dt_softplus,
        dt_limit=dt_limit,
    )
    y = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    pool = _scan(
        x, dt, B, C, z, params, plan, initial_states, y, kernels or default_kernels(x.device.type)
    )

    def states(slots: Sequence[Sequence[int]] | Sequence[int]) -> torch.Tensor:
        index = torch.tensor(slots, dtype=torch.int64, device=x.device)
        return pool[index]

    returned = [] if out is not None else [y]
    kept = torch.float32 if state_dtype is None else state_dtype
    if return_intermediate_states:
        returned.append(states(plan.edge_slots).to(kept))
    if return_final_states:
        returned.append(states([ends[-1] if ends else ZERO_SLOT for ends in plan.end_slots]))
    if return_varlen_states:
        returned.append(states(plan.end_slots[0]).to(kept))
    if len(returned) > 1:
        return tuple(returned)
    return returned[0] if returned else None


def _scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    z: torch.Tensor | None,
    params: SsmLayerParams,
    plan: ScanPlan,
    initial_states: torch.Tensor | None,
    out: torch.Tensor,
    kernels: Kernels,
) -> torch.Tensor:
    """Write y to ``out``. Returns the states by slot, (num_slots, nheads, headdim, dstate) fp32."""
    x, dt, B, C = (tensor.flatten(0, 1) for tensor in (x, dt, B, C))
    z = None if z is None else z.flatten(0, 1)
    # The kernels have one D for a head and one dtype for all.
    per_channel_D = params.D if params.D is not None and params.D.dim() == 2 else None
    alike = {t.dtype for t in (x, B, C, z, out) if t is not None} == {x.dtype}
    direct = per_channel_D is None and alike and x.dtype in ACTIVATION_DTYPES
    if dt.dtype not in ACTIVATION_DTYPES:
        dt = dt.float()
    if not direct:
        x, B, C = (tensor.float() for tensor in (x, B, C))
    state = scan_state(
        x,
        B,
        plan.num_slots,
        len(plan.extend.sequences),
        plan.extend.grid,
        zero_tails=any(sequence.start for sequence in plan.extend.sequences),
    )
    if initial_states is not None:
        first = ZERO_SLOT + 1
        state.ssm_state[first : first + len(initial_states)] = initial_states
    if direct:
        y = out.flatten(0, 1) if out.is_contiguous() else torch.empty_like(x)
        _run(x, dt, B, C, z, params, plan, state, y, kernels)
    else:
        y = torch.empty_like(x)
        per_head = params if per_channel_D is None else _without_D(params)
        _run(x, dt, B, C, None, per_head, plan, state, y, kernels)
        if per_channel_D is not None:
            y += per_channel_D * x
        if z is not None:
            y *= silu(z.float())
    if y.data_ptr() != out.data_ptr():
        out.copy_(y.view(out.shape))
    return state.ssm_state


def _run(
    x: torch.Tensor,
    dt: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    z: torch.Tensor | None,
    params: SsmLayerParams,
    plan: ScanPlan,
    state: LayerState,
    out: torch.Tensor,
    kernels: Kernels,
) -> None:
    if plan.extend.sequences:
        kernels.chunk_scan(x, dt, B, C, params=params, plan=plan.extend, state=state, out=out, z=z)
    if plan.commit.dst_slots:
        kernels.commit(params=params, plan=plan.commit, state=state)


def _without_D(params: SsmLayerParams) -> SsmLayerParams:
    return SsmLayerParams(
        A=params.A,
        D=None,
        dt_bias=params.dt_bias,
        dt_softplus=params.dt_softplus,
        dt_limit=params.dt_limit,
    )


def _sequences(
    x: torch.Tensor,
    initial_states: torch.Tensor | None,
    seq_idx: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> list[list[Stretch]]:
    """The sequences in each row of the batch."""
    batch, seqlen = x.shape[:2]
    has_initial = initial_states is not None
    if cu_seqlens is not None:
        if batch != 1:
            raise ValueError(f"cu_seqlens: sequences are packed in a batch of 1, not {batch}")
        return [stretches_of_packed(packed_offsets("cu_seqlens", cu_seqlens, seqlen), has_initial)]
    if seq_idx is None:
        return [stretches_of_row(row, seqlen, None, has_initial) for row in range(batch)]
    if seq_idx.shape != (batch, seqlen):
        raise ValueError(f"seq_idx: shape {tuple(seq_idx.shape)}, expected {(batch, seqlen)}")
    numbers = host_list("seq_idx", seq_idx)
    return [
        stretches_of_row(row, seqlen, numbers[row * seqlen : (row + 1) * seqlen], has_initial)
        for row in range(batch)
    ]


def _check(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    chunk_size: int,
    out: torch.Tensor | None,
) -> None:
    for name, tensor in (("x", x), ("B", B)):
        if tensor.dim() != 4:
            raise ValueError(f"{name}: {tensor.dim()} dimensions, expected 4")
    batch, seqlen, nheads, headdim = x.shape
    ngroups = B.shape[2]
    check_tensor("x", x, tuple(x.shape), _FLOATS)
    check_tensor("dt", dt, (batch, seqlen, nheads), _FLOATS)
    check_tensor("A", A, (nheads,), _FLOATS)
    check_tensor("B", B, (batch, seqlen, *B.shape[2:]), _FLOATS)
    if not ngroups or nheads % ngroups:
        raise ValueError(f"B: {nheads} heads do not divide into {ngroups} groups")
    check_tensor("C", C, tuple(B.shape), _FLOATS)
    if D is not None:
        check_tensor("D", D, (nheads, headdim) if D.dim() == 2 else (nheads,), _FLOATS)
    if dt_bias is not None:
        check_tensor("dt_bias", dt_bias, (nheads,), _FLOATS)
    for name, optional in (("z", z), ("out", out)):
        if optional is not None:
            check_tensor(name, optional, tuple(x.shape), _FLOATS)
    if chunk_size < 1:
        raise ValueError(f"chunk_size: {chunk_size}")


def _check_initial_states(
    initial_states: torch.Tensor | None,
    x: torch.Tensor,
    B: torch.Tensor,
    rows: list[list[Stretch]],
    cu_seqlens: torch.Tensor | None,
) -> None:
    if initial_states is not None:
        count = len(rows) if cu_seqlens is None else len(rows[0])
        check_tensor("initial_states", initial_states, (count, *x.shape[2:], B.shape[3]), _FLOATS)
