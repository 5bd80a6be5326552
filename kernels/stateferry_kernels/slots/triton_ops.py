# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Slot operations in Triton: same arguments as those of torch_ops.py, one launch each for both
pools and all layers."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from stateferry_kernels.layer_state import PAD_SLOT
from stateferry_kernels.slots.checks import check_indices, check_pools, check_steps

_PAD = tl.constexpr(PAD_SLOT)
_BLOCK = 2048


@triton.jit
def _move(dst, src, SIZE: tl.constexpr, block, BLOCK: tl.constexpr):
    """Words [block * BLOCK, ..) of one layer; zeros without a source."""
    word = block * BLOCK + tl.arange(0, BLOCK)
    mask = word < SIZE
    if src is not None:
        values = tl.load(src + word, mask=mask, other=0)
    else:
        values = tl.zeros((BLOCK,), dtype=dst.dtype.element_ty)
    tl.store(dst + word, values, mask=mask)


@triton.jit
def _slots_kernel(
    ssm_ptr,
    conv_ptr,
    ssm_src_ptr,
    conv_src_ptr,
    rows_ptr,
    steps_ptr,
    dst_ptr,
    ssm_stride,
    conv_stride,
    ssm_src_stride,
    conv_src_stride,
    NUM_LAYERS: tl.constexpr,
    NUM_STEPS: tl.constexpr,
    SSM_SIZE: tl.constexpr,
    CONV_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of one layer of one entry. Sizes are words of a layer; a source holds NUM_STEPS
    states per layer. Without sources it clears, without steps it copies."""
    SSM_BLOCKS: tl.constexpr = (SSM_SIZE + BLOCK - 1) // BLOCK
    BLOCKS: tl.constexpr = SSM_BLOCKS + (CONV_SIZE + BLOCK - 1) // BLOCK
    block = tl.program_id(0) % BLOCKS
    layer = (tl.program_id(0) // BLOCKS % NUM_LAYERS).to(tl.int64)
    entry = tl.program_id(0) // (BLOCKS * NUM_LAYERS)
    dst = tl.load(dst_ptr + entry).to(tl.int64)
    if dst == _PAD:
        return
    ssm = ssm_ptr + dst * ssm_stride + layer * SSM_SIZE
    conv = conv_ptr + dst * conv_stride + layer * CONV_SIZE
    if ssm_src_ptr is None:
        if block < SSM_BLOCKS:
            _move(ssm, None, SSM_SIZE, block, BLOCK)
        else:
            _move(conv, None, CONV_SIZE, block - SSM_BLOCKS, BLOCK)
    else:
        row = tl.load(rows_ptr + entry).to(tl.int64)
        if row == _PAD:
            return
        state = layer * NUM_STEPS
        if steps_ptr is not None:
            step = tl.load(steps_ptr + entry).to(tl.int64)
            if step == _PAD:
                return
            state += step
        ssm_src = ssm_src_ptr + row * ssm_src_stride + state * SSM_SIZE
        conv_src = conv_src_ptr + row * conv_src_stride + state * CONV_SIZE
        if block < SSM_BLOCKS:
            _move(ssm, ssm_src, SSM_SIZE, block, BLOCK)
        else:
            _move(conv, conv_src, CONV_SIZE, block - SSM_BLOCKS, BLOCK)


def copy_slots(
    ssm_state: torch.Tensor,
    conv_state: torch.Tensor,
    *,
    src_slots: torch.Tensor,
    dst_slots: torch.Tensor,
) -> None:
    """Copy whole states, all layers, to the byte: see torch_ops.py.

    Mutates:  ssm_state and conv_state at dst_slots.
    Raises:   TypeError, ValueError on a mismatch.
    """
    check_pools(ssm_state, conv_state)
    check_indices(src_slots=src_slots, dst_slots=dst_slots)
    _launch(ssm_state, conv_state, ssm_state, conv_state, src_slots, None, dst_slots)


def clear_slots(
    ssm_state: torch.Tensor, conv_state: torch.Tensor, *, state_slots: torch.Tensor
) -> None:
    """Fill whole states with zeros: see torch_ops.py.

    Mutates:  ssm_state and conv_state at state_slots.
    Raises:   TypeError, ValueError on a mismatch.
    """
    check_pools(ssm_state, conv_state)
    check_indices(state_slots=state_slots)
    _launch(ssm_state, conv_state, None, None, None, None, state_slots)


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
    """Put the states after the accepted steps where they belong: see torch_ops.py.

    Mutates:  ssm_state and conv_state at dst_slots.
    Raises:   TypeError, ValueError on a mismatch.
    """
    check_pools(ssm_state, conv_state)
    check_steps(ssm_state, conv_state, step_states, step_windows)
    check_indices(step_rows=step_rows, steps=steps, dst_slots=dst_slots)
    _launch(ssm_state, conv_state, step_states, step_windows, step_rows, steps, dst_slots)


def _launch(
    ssm_state: torch.Tensor,
    conv_state: torch.Tensor,
    ssm_src: torch.Tensor | None,
    conv_src: torch.Tensor | None,
    rows: torch.Tensor | None,
    steps: torch.Tensor | None,
    dst_slots: torch.Tensor,
) -> None:
    num_layers = ssm_state.shape[1]
    sizes = [math.prod(pool.shape[2:]) for pool in (ssm_state, conv_state)]
    blocks = sum(math.ceil(size / _BLOCK) for size in sizes)
    if not len(dst_slots) * num_layers * blocks:
        return
    ssm, conv, ssm_src, conv_src = (
        None if pool is None else _bits(pool) for pool in (ssm_state, conv_state, ssm_src, conv_src)
    )
    _slots_kernel[(len(dst_slots) * num_layers * blocks,)](
        ssm,
        conv,
        ssm_src,
        conv_src,
        rows,
        steps,
        dst_slots,
        ssm_state.stride(0),
        conv_state.stride(0),
        0 if ssm_src is None else ssm_src.stride(0),
        0 if conv_src is None else conv_src.stride(0),
        NUM_LAYERS=num_layers,
        NUM_STEPS=1 if steps is None or ssm_src is None else ssm_src.shape[2],
        SSM_SIZE=sizes[0],
        CONV_SIZE=sizes[1],
        BLOCK=_BLOCK,
    )


def _bits(pool: torch.Tensor) -> torch.Tensor:
    """The same memory as integers, so that no bit of a NaN changes on the way."""
    return pool.view(torch.int32 if pool.element_size() == 4 else torch.int16)
