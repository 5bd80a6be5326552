"""Checks at every host entry. They raise; what they let through, a kernel may rely on."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from stateferry_kernels.draft_plans import AcceptPlan, VerifyPlan
from stateferry_kernels.kv_layer import KvLayer, KvPlan, KvSequence
from stateferry_kernels.layer_state import (
    ACTIVATION_DTYPES,
    PAD_SLOT,
    STATE_DTYPES,
    ConvParams,
    DraftRows,
    LayerState,
    SsmLayerParams,
)
from stateferry_kernels.plans import CommitPlan, DecodePlan, ExtendPlan


def check_tensor(
    name: str,
    tensor: torch.Tensor,
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
) -> None:
    """Raises TypeError on a dtype, ValueError on a shape that is not the one wanted."""
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name}: {tensor.dtype}, expected {' or '.join(map(str, dtypes))}")
    if tensor.shape != shape:
        raise ValueError(f"{name}: shape {tuple(tensor.shape)}, expected {shape}")


def check_pool(name: str, tensor: torch.Tensor) -> None:
    """Raises ValueError unless every dimension but the first is contiguous."""
    if tensor.shape[0] and not tensor[0].is_contiguous():
        raise ValueError(f"{name}: only the first dimension may be strided")


def check_ssm_inputs(
    x: torch.Tensor,
    dt: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    z: torch.Tensor | None,
    out: torch.Tensor,
    params: SsmLayerParams,
    state: LayerState,
    num_rows: int,
) -> None:
    """Raises TypeError or ValueError unless all fit each other: x, out and z
    (num_rows, nheads, headdim), dt (num_rows, nheads), B and C (num_rows, ngroups, dstate)."""
    _, nheads, headdim, dstate = state.ssm_state.shape
    ngroups = state.tail_B.shape[2]
    dtypes = (state.tail_x.dtype,)
    check_tensor("x", x, (num_rows, nheads, headdim), dtypes)
    check_tensor("dt", dt, (num_rows, nheads), ACTIVATION_DTYPES)
    check_tensor("B", B, (num_rows, ngroups, dstate), dtypes)
    check_tensor("C", C, (num_rows, ngroups, dstate), dtypes)
    check_tensor("out", out, (num_rows, nheads, headdim), dtypes)
    if z is not None:
        check_tensor("z", z, (num_rows, nheads, headdim), dtypes)
    check_params(params, nheads)
    check_state(state)
    if nheads % ngroups:
        raise ValueError(f"{nheads} heads do not divide into {ngroups} groups")


def check_conv_inputs(
    xBC: torch.Tensor, conv: ConvParams, state: LayerState, out: torch.Tensor, num_rows: int
) -> None:
    """Raises TypeError or ValueError unless all fit: xBC and out (num_rows, conv_dim)."""
    check_state(state)
    conv_dim, window = state.conv_state.shape[1:]
    dtypes = (state.conv_state.dtype,)
    check_tensor("xBC", xBC, (num_rows, conv_dim), dtypes)
    check_tensor("out", out, (num_rows, conv_dim), dtypes)
    check_tensor("weight", conv.weight, (conv_dim, window + 1), ACTIVATION_DTYPES)
    if conv.bias is not None:
        check_tensor("bias", conv.bias, (conv_dim,), ACTIVATION_DTYPES)


def check_params(params: SsmLayerParams, nheads: int) -> None:
    """Raises TypeError or ValueError on parameters of another layer's size."""
    check_tensor("A", params.A, (nheads,), (torch.float32,))
    if params.D is not None:
        check_tensor("D", params.D, (nheads,), (torch.float32,))
    if params.dt_bias is not None:
        check_tensor("dt_bias", params.dt_bias, (nheads,), (torch.float32,))
    low, high = params.dt_limit
    if not low <= high:
        raise ValueError(f"dt_limit: {low} is above {high}")


def check_state(state: LayerState) -> None:
    """Raises TypeError or ValueError unless the views describe one layer of one model.

    Views do not change, so this happens once for each.
    """
    if "checked" in state.cache:
        return
    num_slots, nheads, headdim, dstate = state.ssm_state.shape
    num_pages, grid, ngroups, _ = state.tail_B.shape
    conv_dim, window = state.conv_state.shape[1:]
    activation = (state.tail_x.dtype,)
    check_tensor("ssm_state", state.ssm_state, state.ssm_state.shape, STATE_DTYPES)
    check_tensor("conv_state", state.conv_state, (num_slots, conv_dim, window), activation)
    check_tensor("tail_xBC", state.tail_xBC, (num_pages, grid, conv_dim), activation)
    check_tensor("tail_x", state.tail_x, (num_pages, grid, nheads, headdim), ACTIVATION_DTYPES)
    check_tensor("tail_B", state.tail_B, (num_pages, grid, ngroups, dstate), activation)
    check_tensor("tail_dt", state.tail_dt, (num_pages, grid, nheads), (torch.float32,))
    if conv_dim != nheads * headdim + 2 * ngroups * dstate:
        raise ValueError(f"conv_dim {conv_dim} does not fit nheads, headdim, ngroups and dstate")
    if grid < window:
        raise ValueError(f"a grid of {grid} is shorter than the convolution's window of {window}")
    for name in ("ssm_state", "conv_state", "tail_xBC", "tail_x", "tail_B", "tail_dt"):
        check_pool(name, getattr(state, name))
    state.cache["checked"] = True


def check_drafts(drafts: DraftRows, state: LayerState) -> None:
    """Raises TypeError or ValueError unless the draft pages fit the layer's tails."""
    if "checked" in drafts.cache:
        return
    num_pages, max_draft = drafts.dt.shape[:2]
    for name in ("xBC", "x", "B", "dt"):
        tail, draft = getattr(state, f"tail_{name}"), getattr(drafts, name)
        shape = (num_pages, max_draft, *tail.shape[2:])
        check_tensor(f"drafts.{name}", draft, shape, (tail.dtype,))
        check_pool(f"drafts.{name}", draft)
    drafts.cache["checked"] = True


def check_extend_plan(plan: ExtendPlan, state: LayerState) -> None:
    """Raises ValueError unless the plan's grid, slots and pages are those of the pools."""
    key = _plan_key(plan.grid, state)
    if key in plan.cache:
        return
    slots = [sequence.state_slot for sequence in plan.sequences]
    slots += [write.state_slot for sequence in plan.sequences for write in sequence.boundaries]
    _check_range("state_slot", slots, state.ssm_state)
    _check_range("tail_page", [sequence.tail_page for sequence in plan.sequences], state.tail_dt)
    plan.cache[key] = True


def check_decode_plan(plan: DecodePlan, state: LayerState) -> None:
    """Raises ValueError unless the plan's grid, slots and pages are those of the pools."""
    key = _plan_key(plan.grid, state)
    if key in plan.cache:
        return
    _check_range("state_slots", plan.state_slots, state.ssm_state, lowest=PAD_SLOT)
    pages = zip(plan.state_slots, plan.tail_pages, strict=True)
    live = [page for slot, page in pages if slot != PAD_SLOT]
    _check_range("tail_pages", live, state.tail_dt)
    plan.cache[key] = True


def check_commit_plan(plan: CommitPlan, state: LayerState) -> None:
    """Raises ValueError unless the plan's grid, slots and pages are those of the pools."""
    key = _plan_key(plan.grid, state)
    if key in plan.cache:
        return
    _check_range("src_slots", plan.src_slots, state.ssm_state)
    _check_range("dst_slots", plan.dst_slots, state.ssm_state)
    _check_range("tail_pages", plan.tail_pages, state.tail_dt)
    plan.cache[key] = True


def check_verify_plan(plan: VerifyPlan, state: LayerState, drafts: DraftRows) -> None:
    """Raises ValueError unless the plan's grid, slots and pages are those of the pools."""
    key = f"{_plan_key(plan.grid, state)}:{tuple(drafts.dt.shape[:2])}"
    if key in plan.cache:
        return
    _check_range("state_slot", [s.state_slot for s in plan.sequences], state.ssm_state)
    _check_range("tail_page", [s.tail_page for s in plan.sequences], state.tail_dt)
    _check_range("draft_page", [s.draft_page for s in plan.sequences], drafts.dt)
    longest = max((len(sequence.parents) for sequence in plan.sequences), default=0)
    if longest > drafts.dt.shape[1]:
        raise ValueError(f"a draft of {longest} tokens, pages hold {drafts.dt.shape[1]}")
    plan.cache[key] = True


def check_accept_plan(plan: AcceptPlan, state: LayerState, drafts: DraftRows) -> None:
    """Raises ValueError unless the plan's grid, slots and pages are those of the pools."""
    key = f"{_plan_key(plan.grid, state)}:{tuple(drafts.dt.shape[:2])}"
    if key in plan.cache:
        return
    _check_range("state_slot", [s.state_slot for s in plan.sequences], state.ssm_state)
    written = [s.boundary_slot for s in plan.sequences if s.boundary_slot != PAD_SLOT]
    _check_range("boundary_slot", written, state.ssm_state)
    _check_range("tail_page", [s.tail_page for s in plan.sequences], state.tail_dt)
    _check_range("draft_page", [s.draft_page for s in plan.sequences], drafts.dt)
    _check_range("path", [s.path[-1] for s in plan.sequences], drafts.dt[0])
    plan.cache[key] = True


def check_rows(name: str, rows: torch.Tensor, like: torch.Tensor | None = None) -> None:
    """Raises TypeError or ValueError unless rows (num_rows, n) are activations, contiguous along n,
    and of the shape and dtype of ``like``."""
    if rows.dim() != 2:
        raise ValueError(f"{name}: {rows.dim()} dimensions, expected 2")
    if like is None:
        check_tensor(name, rows, rows.shape, ACTIVATION_DTYPES)
    else:
        check_tensor(name, rows, like.shape, (like.dtype,))
    if rows.shape[1] > 1 and rows.stride(1) != 1:
        raise ValueError(f"{name}: only the first dimension may be strided")


def check_rotary_inputs(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor
) -> None:
    """Raises TypeError or ValueError unless all fit each other."""
    if x.dim() != 3 or cos.dim() != 2:
        raise ValueError(f"x and cos: {x.dim()} and {cos.dim()} dimensions, expected 3 and 2")
    check_tensor("x", x, x.shape, ACTIVATION_DTYPES)
    check_tensor("cos", cos, cos.shape, (torch.float32,))
    check_tensor("sin", sin, cos.shape, (torch.float32,))
    check_tensor("positions", positions, x.shape[:1], (torch.int64,))
    if 2 * cos.shape[1] > x.shape[2]:
        raise ValueError(f"cos: {cos.shape[1]} pairs, heads have {x.shape[2]} features")


def check_attention_inputs(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    kv: KvLayer,
    num_rows: int,
) -> None:
    """Raises TypeError or ValueError unless all fit each other: q and out
    (num_rows, num_heads, head_dim), k and v (num_rows, kv_heads, head_dim)."""
    check_kv_layer(kv)
    _, kv_heads, _, head_dim = kv.keys.shape
    dtypes = (kv.keys.dtype,)
    num_heads = q.shape[1] if q.dim() == 3 else 0
    check_tensor("q", q, (num_rows, num_heads, head_dim), dtypes)
    check_tensor("k", k, (num_rows, kv_heads, head_dim), dtypes)
    check_tensor("v", v, (num_rows, kv_heads, head_dim), dtypes)
    check_tensor("out", out, (num_rows, num_heads, head_dim), dtypes)
    if not num_heads or num_heads % kv_heads:
        raise ValueError(f"q: {num_heads} heads do not divide over {kv_heads} of the keys")


def check_kv_layer(kv: KvLayer) -> None:
    """Raises TypeError or ValueError unless the views describe one layer. Once for each."""
    if "checked" in kv.cache:
        return
    if kv.keys.dim() != 4 or not min(kv.keys.shape[1:]):
        raise ValueError(f"keys: shape {tuple(kv.keys.shape)}, expected four dimensions, not empty")
    check_tensor("keys", kv.keys, kv.keys.shape, ACTIVATION_DTYPES)
    check_tensor("values", kv.values, kv.keys.shape, (kv.keys.dtype,))
    check_pool("keys", kv.keys)
    check_pool("values", kv.values)
    kv.cache["checked"] = True


def check_kv_plan(plan: KvPlan, kv: KvLayer) -> None:
    """Raises ValueError unless every sequence has its pages, all of them in the pool, and those it
    writes for itself."""
    num_pages, size = kv.keys.shape[0], kv.page_tokens
    key = f"checked:{num_pages}:{size}"
    if key in plan.cache:
        return
    if plan.page_tokens != size:
        raise ValueError(f"page_tokens: {plan.page_tokens}, expected the pool's {size}")
    written: set[int] = set()
    for sequence in plan.sequences:
        pages = sequence.pages
        if sequence.start < 0 or sequence.length < 0:
            raise ValueError(f"start, length: {sequence.start}, {sequence.length}, below 0")
        if len(pages) * size < sequence.end:
            raise ValueError(
                f"pages: {len(pages)} of {size} tokens, a sequence ends at {sequence.end}"
            )
        if pages and not 0 <= min(pages) <= max(pages) < num_pages:
            raise ValueError(f"pages: {min(pages)} to {max(pages)}, expected 0 to {num_pages - 1}")
        own = _written_pages(sequence, size)
        if not written.isdisjoint(own) or len(set(own)) < len(own):
            raise ValueError("pages: two places that are written share a page")
        written.update(own)
    for sequence in plan.sequences:
        if not written.isdisjoint(sequence.pages[: sequence.start // size]):
            raise ValueError("pages: a page is written that somebody reads as finished")
    plan.cache[key] = True


def _written_pages(sequence: KvSequence, size: int) -> tuple[int, ...]:
    if not sequence.length:
        return ()
    return sequence.pages[sequence.start // size : -(-sequence.end // size)]


def _plan_key(grid: int, state: LayerState) -> str:
    """Where a plan notes that it was checked against pools of this size: the layers of a step
    share them. Raises ValueError when the grids differ."""
    if "plan key" not in state.cache:
        key = f"checked:{state.ssm_state.shape[0]}:{state.tail_dt.shape[0]}"
        state.cache["plan key"] = (state.grid, key)
    expected, noted = state.cache["plan key"]
    if grid != expected:
        raise ValueError(f"grid: {grid}, expected the pools' {expected}")
    return str(noted)


def _check_range(name: str, numbers: Sequence[int], pool: torch.Tensor, lowest: int = 0) -> None:
    for number in numbers:
        if not lowest <= number < pool.shape[0]:
            raise ValueError(f"{name}: {number}, expected {lowest} to {pool.shape[0] - 1}")
