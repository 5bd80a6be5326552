"""The definitions behind the host entries: every operation in fp64, token by token, far too slow to
serve with. A whole model can run on it, to find which of a faster backend's operations is wrong.

Each function mutates what the operation of its name in torch_ops.py does.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from stateferry_kernels.activation.reference import relu2_reference, silu_mul_reference
from stateferry_kernels.attention.pages import sequence_keys
from stateferry_kernels.attention.reference import attention_reference
from stateferry_kernels.conv1d.reference import causal_conv1d_reference
from stateferry_kernels.draft_plans import AcceptPlan, VerifyPlan
from stateferry_kernels.guards import (
    check_accept_plan,
    check_attention_inputs,
    check_commit_plan,
    check_decode_plan,
    check_drafts,
    check_extend_plan,
    check_kv_plan,
    check_rotary_inputs,
    check_rows,
    check_ssm_inputs,
    check_verify_plan,
)
from stateferry_kernels.kv_layer import KvLayer, KvPlan, KvSequence
from stateferry_kernels.layer_state import (
    PAD_SLOT,
    ConvParams,
    DraftRows,
    LayerState,
    SsmLayerParams,
)
from stateferry_kernels.norm import reference as norms
from stateferry_kernels.plans import CommitPlan, DecodePlan, ExtendPlan
from stateferry_kernels.rotary.reference import rotary_reference
from stateferry_kernels.state_update.reference import commit_reference, decode_row_reference


def chunk_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    *,
    params: SsmLayerParams,
    plan: ExtendPlan,
    state: LayerState,
    out: torch.Tensor,
    z: torch.Tensor | None = None,
) -> None:
    check_ssm_inputs(x, dt, B, C, z, out, params, state, plan.total_tokens)
    check_extend_plan(plan, state)
    token = 0
    for sequence in plan.sequences:
        slots = {write.position: write.state_slot for write in sequence.boundaries}
        ssm_state = state.ssm_state[sequence.state_slot].double()
        page, old_rows = sequence.tail_page, sequence.start % plan.grid
        now = _folded(ssm_state, page, old_rows, params, state)
        for position in range(sequence.start, sequence.end):
            now, processed = _step(x, dt, B, C, z, token, now, params, out)
            if position >= sequence.end // plan.grid * plan.grid:
                _append(x, B, processed, token, (page, position % plan.grid), state)
            if (position + 1) % plan.grid == 0:
                now = now.to(state.ssm_state.dtype).double()
            if position + 1 in slots:
                state.ssm_state[slots[position + 1]] = now.to(state.ssm_state.dtype)
            token += 1


def decode_row(
    x: torch.Tensor,
    dt: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    *,
    params: SsmLayerParams,
    plan: DecodePlan,
    state: LayerState,
    out: torch.Tensor,
    z: torch.Tensor | None = None,
) -> None:
    check_ssm_inputs(x, dt, B, C, z, out, params, state, len(plan.state_slots))
    check_decode_plan(plan, state)
    for token, slot in enumerate(plan.state_slots):
        if slot != PAD_SLOT:
            page, row = plan.tail_pages[token], plan.tail_rows[token]
            now = _folded(state.ssm_state[slot].double(), page, row, params, state)
            _, processed = _step(x, dt, B, C, z, token, now, params, out)
            _append(x, B, processed, token, (page, row), state)


def commit(*, params: SsmLayerParams, plan: CommitPlan, state: LayerState) -> None:
    check_commit_plan(plan, state)
    entries = zip(plan.src_slots, plan.dst_slots, plan.tail_pages, plan.tail_rows, strict=True)
    for src, dst, page, rows in entries:
        folded = _folded(state.ssm_state[src].double(), page, rows, params, state)
        state.ssm_state[dst] = folded.to(state.ssm_state.dtype)
        columns = torch.cat([state.conv_state[src].mT, state.tail_xBC[page, :rows]])
        state.conv_state[dst] = columns[rows:].mT


def verify(
    x: torch.Tensor,
    dt: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    *,
    params: SsmLayerParams,
    plan: VerifyPlan,
    state: LayerState,
    drafts: DraftRows,
    out: torch.Tensor,
    z: torch.Tensor | None = None,
) -> None:
    check_ssm_inputs(x, dt, B, C, z, out, params, state, plan.num_rows)
    check_drafts(drafts, state)
    check_verify_plan(plan, state, drafts)
    token = 0
    for sequence in plan.sequences:
        root = state.ssm_state[sequence.state_slot].double()
        root = _folded(root, sequence.tail_page, sequence.tail_rows, params, state)
        after: list[torch.Tensor] = []
        for node, path in enumerate(sequence.paths()):
            before = after[path[-2]] if len(path) > 1 else root
            now, processed = _step(x, dt, B, C, z, token, before, params, out)
            if sequence.tail_rows + len(path) == plan.grid:
                now = now.to(state.ssm_state.dtype).double()
            after.append(now)
            place = (sequence.draft_page, node)
            drafts.x[place], drafts.B[place] = x[token], B[token]
            drafts.dt[place] = processed.float()
            token += 1


def accept(
    *, params: SsmLayerParams, plan: AcceptPlan, state: LayerState, drafts: DraftRows
) -> None:
    check_drafts(drafts, state)
    check_accept_plan(plan, state, drafts)
    for sequence in plan.sequences:
        page, row = sequence.tail_page, sequence.tail_rows
        for node in sequence.path:
            place = (sequence.draft_page, node)
            state.tail_xBC[page, row] = drafts.xBC[place]
            state.tail_x[page, row] = drafts.x[place]
            state.tail_B[page, row] = drafts.B[place]
            state.tail_dt[page, row] = drafts.dt[place]
            row += 1
            if row == plan.grid:
                slots = ((sequence.state_slot,), (sequence.boundary_slot,), (page,))
                commit(params=params, plan=CommitPlan(plan.grid, *slots), state=state)
                row = 0


def causal_conv1d_extend(
    xBC: torch.Tensor, *, conv: ConvParams, plan: ExtendPlan, state: LayerState, out: torch.Tensor
) -> None:
    check_extend_plan(plan, state)
    window = state.conv_state.shape[2]
    token = 0
    for sequence in plan.sequences:
        old_rows, page = sequence.start % plan.grid, sequence.tail_page
        # Every column since d_conv - 1 before the grid point.
        columns = torch.cat(
            [
                state.conv_state[sequence.state_slot].mT,
                state.tail_xBC[page, :old_rows],
                xBC[token : token + sequence.length],
            ]
        )
        out[token : token + sequence.length] = _convolved(columns, conv)[window + old_rows :]
        first = sequence.start - old_rows
        for write in sequence.boundaries:
            end = window + write.position - first
            state.conv_state[write.state_slot] = columns[end - window : end].mT
        begin = max(sequence.start, sequence.end // plan.grid * plan.grid)
        for position in range(begin, sequence.end):
            state.tail_xBC[page, position % plan.grid] = columns[window + position - first]
        token += sequence.length


def causal_conv1d_row(
    xBC: torch.Tensor, *, conv: ConvParams, plan: DecodePlan, state: LayerState, out: torch.Tensor
) -> None:
    check_decode_plan(plan, state)
    for token, slot in enumerate(plan.state_slots):
        if slot == PAD_SLOT:
            continue
        page, row = plan.tail_pages[token], plan.tail_rows[token]
        state.tail_xBC[page, row] = xBC[token]
        columns = torch.cat([state.conv_state[slot].mT, state.tail_xBC[page, : row + 1]])
        out[token] = _convolved(columns, conv)[-1]


def causal_conv1d_verify(
    xBC: torch.Tensor,
    *,
    conv: ConvParams,
    plan: VerifyPlan,
    state: LayerState,
    drafts: DraftRows,
    out: torch.Tensor,
) -> None:
    check_drafts(drafts, state)
    check_verify_plan(plan, state, drafts)
    token = 0
    for sequence in plan.sequences:
        tail = state.tail_xBC[sequence.tail_page, : sequence.tail_rows]
        before = torch.cat([state.conv_state[sequence.state_slot].mT, tail])
        for node, path in enumerate(sequence.paths()):
            drafts.xBC[sequence.draft_page, node] = xBC[token]
            columns = torch.cat([before, drafts.xBC[sequence.draft_page, list(path)]])
            out[token] = _convolved(columns, conv)[-1]
            token += 1


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return norms.rms_norm_reference(x.double(), weight.double(), eps).to(weight.dtype)


def gated_rms_norm(
    x: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, eps: float, group_size: int
) -> torch.Tensor:
    return _wide(norms.gated_rms_norm_reference, x, z, weight, eps, group_size)


def norm_then_gate(
    x: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, eps: float, group_size: int
) -> torch.Tensor:
    return _wide(norms.norm_then_gate_reference, x, z, weight, eps, group_size)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    summed = (x.double() + residual.double()).to(residual.dtype)
    return rms_norm(summed, weight, eps), summed


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    plan: KvPlan,
    kv: KvLayer,
    scale: float,
    out: torch.Tensor,
) -> None:
    check_attention_inputs(q, k, v, out, kv, plan.total_tokens)
    check_kv_plan(plan, kv)
    token = 0
    for sequence in plan.sequences:
        for position in range(sequence.start, sequence.end):
            page, row = sequence.pages[position // plan.page_tokens], position % plan.page_tokens
            kv.keys[page, :, row], kv.values[page, :, row] = k[token], v[token]
            seen = KvSequence(position, 1, sequence.pages)
            keys, values = (sequence_keys(pool, seen).double() for pool in (kv.keys, kv.values))
            out[token] = attention_reference(q[token].double(), keys, values, scale).to(out.dtype)
            token += 1


def rotary(
    x: torch.Tensor, *, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    check_rotary_inputs(x, cos, sin, positions)
    return rotary_reference(x.double(), cos.double(), sin.double(), positions).to(x.dtype)


def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    check_rows("gate", gate)
    check_rows("up", up, like=gate)
    return silu_mul_reference(gate.double(), up.double()).to(gate.dtype)


def relu2(x: torch.Tensor) -> torch.Tensor:
    check_rows("x", x)
    return relu2_reference(x.double()).to(x.dtype)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    wide_bias = None if bias is None else bias.double()
    return F.linear(x.double(), weight.double(), wide_bias).to(x.dtype)


def _step(
    x: torch.Tensor,
    dt: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    z: torch.Tensor | None,
    token: int,
    now: torch.Tensor,
    params: SsmLayerParams,
    out: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Write a token's output. now: the state before it, fp64. Returns the state after it and the
    processed dt."""
    x_wide, dt_wide, B_wide, C_wide = (tensor[token].double() for tensor in (x, dt, B, C))
    y, processed = decode_row_reference(x_wide, dt_wide, B_wide, C_wide, now, params)
    if z is not None:
        y = y * F.silu(z[token].double())
    out[token] = y.to(out.dtype)
    after = commit_reference(now, x_wide[None], processed[None], B_wide[None], params)
    return after, processed


def _append(
    x: torch.Tensor,
    B: torch.Tensor,
    processed: torch.Tensor,
    token: int,
    place: tuple[int, int],
    state: LayerState,
) -> None:
    """Leave a token in its tail. place: page, row."""
    state.tail_x[place] = x[token]
    state.tail_B[place] = B[token]
    state.tail_dt[place] = processed.float()


def _folded(
    ssm_state: torch.Tensor, page: int, rows: int, params: SsmLayerParams, state: LayerState
) -> torch.Tensor:
    x, dt, B = (tail[page, :rows].double() for tail in (state.tail_x, state.tail_dt, state.tail_B))
    return commit_reference(ssm_state, x, dt, B, params)


def _convolved(columns: torch.Tensor, conv: ConvParams) -> torch.Tensor:
    bias = None if conv.bias is None else conv.bias.double()
    wide = causal_conv1d_reference(columns.double(), conv.weight.double(), bias)
    return wide.to(columns.dtype)


def _wide(
    norm: Callable[..., torch.Tensor],
    x: torch.Tensor,
    z: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    group_size: int,
) -> torch.Tensor:
    return norm(x.double(), z.double(), weight.double(), eps, group_size).to(x.dtype)
