"""``selective_state_update`` with the arguments of mamba_ssm and of SGLang."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from stateferry_kernels.elementwise import silu
from stateferry_kernels.guards import check_pool, check_tensor
from stateferry_kernels.layer_state import PAD_SLOT, SsmLayerParams
from stateferry_kernels.operations import Kernels
from stateferry_kernels.parity.throwaway import default_kernels

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_INTEGERS = (torch.int32, torch.int64)
_NO_LIMIT = (-math.inf, math.inf)


@torch.no_grad()
def selective_state_update(
    state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: torch.Tensor | None = None,
    pad_slot_id: int = PAD_SLOT,
    out: torch.Tensor | None = None,
    disable_state_update: bool = False,
    intermediate_states_buffer: torch.Tensor | None = None,
    cache_steps: int | None = None,
    retrieve_parent_token: torch.Tensor | None = None,
    intermediate_state_indices: torch.Tensor | None = None,
    *,
    kernels: Kernels | None = None,
) -> torch.Tensor:
    """One token for each sequence, or T of them: state = exp(dt A) state + dt x B,
    y = C . state + D x, times silu(z). mamba_ssm's up to ``state_batch_indices``, the others are
    SGLang's. fp32 arithmetic; fp32, bf16 and fp16 in any mixture.

    Args:
        state: (slots, nheads, dim, dstate), or (slots, dim, dstate) without heads.
        x, dt, z, out: (batch, nheads, dim), (batch, dim) without heads, (batch, T, nheads, dim) for
            T tokens. dt is raw.
        A: (nheads, dim, dstate) or (dim, dstate). D, dt_bias: (nheads, dim) or (dim,).
            A, dt and dt_bias that a head shares must be expanded, with stride 0 over dim and
            dstate, to be seen as such; a single token also works without, on another path.
        B, C: (batch, ngroups, dstate), (batch, dstate) without heads, (batch, T, ngroups, dstate).
        state_batch_indices: (batch,) int32 or int64, the slots; by default 0, 1, ..
        pad_slot_id: marks rows of state_batch_indices that are padding.
        intermediate_states_buffer: (rows, cache_steps, nheads, dim, dstate), cache_steps >= T.
        intermediate_state_indices: (batch,), the buffer's rows; by default the slots. A row of -1
            keeps nothing.
        retrieve_parent_token: (batch, T), needs the buffer. Token t > 0 starts from the state after
            token retrieve_parent_token[i, t] as the buffer holds it; where that is negative, from
            the sequence's state (upstream: from the state after token t - 1).

    Mutates: ``state`` at the slots, with the state after the last token, unless
        disable_state_update; ``intermediate_states_buffer[row, t]``, the state after token t;
        ``out``. For padding rows none of them (upstream writes ``out``).
    Returns: ``out``; one made here is zero in padding rows.
    Raises: TypeError, ValueError naming the argument.
    """
    call = _Call(
        state=state[:, None] if state.dim() == 3 else state,
        x=_per_token(x),
        dt=_per_token(dt),
        A=A[None] if A.dim() == 2 else A,
        B=_per_token(B),
        C=_per_token(C),
        D=_per_head(D),
        z=None if z is None else _per_token(z),
        dt_bias=_per_head(dt_bias),
        dt_softplus=dt_softplus,
    )
    _check(call, state_batch_indices)
    if out is None:
        # Padding rows stay as they are here.
        new = torch.empty_like if state_batch_indices is None else torch.zeros_like
        out = new(x, memory_format=torch.contiguous_format)
    check_tensor("out", out, tuple(x.shape), _FLOATS)
    slots = _slots(call, state_batch_indices, pad_slot_id)
    kernels = kernels or default_kernels(x.device.type)
    if call.is_tied:
        steps = _kept_steps(
            call,
            intermediate_states_buffer,
            cache_steps,
            retrieve_parent_token,
            intermediate_state_indices,
            write_state=not disable_state_update,
        )
        _tied(call, slots, _per_token(out), steps, kernels)
    else:
        asked = {
            "disable_state_update": disable_state_update or None,
            "intermediate_states_buffer": intermediate_states_buffer,
            "retrieve_parent_token": retrieve_parent_token,
            "intermediate_state_indices": intermediate_state_indices,
        }
        _untied(call, slots, _per_token(out), asked, kernels)
    return out


@dataclass(frozen=True, slots=True)
class _Call:
    """The arguments with all their dimensions: x, dt, z (batch, T, nheads, dim), B and C
    (batch, T, ngroups, dstate), A (nheads, dim, dstate), D and dt_bias (nheads, dim)."""

    state: torch.Tensor
    x: torch.Tensor
    dt: torch.Tensor
    A: torch.Tensor
    B: torch.Tensor
    C: torch.Tensor
    D: torch.Tensor | None
    z: torch.Tensor | None
    dt_bias: torch.Tensor | None
    dt_softplus: bool

    @property
    def is_tied(self) -> bool:
        """Whether the channels of a head share A, dt and dt_bias."""
        return (
            _is_shared(self.A, -1)
            and _is_shared(self.A, -2)
            and _is_shared(self.dt, -1)
            and (self.dt_bias is None or _is_shared(self.dt_bias, -1))
        )


@dataclass(frozen=True, slots=True)
class _KeptSteps:
    """What ``Kernels.state_steps`` is told about the states between tokens."""

    states: torch.Tensor | None
    slots: torch.Tensor | None
    parents: torch.Tensor | None
    write_state: bool


def _tied(
    call: _Call, slots: torch.Tensor, out: torch.Tensor, steps: _KeptSteps, kernels: Kernels
) -> None:
    """Mamba-2: through the kernels, which have one dtype for all inputs and one D for a head."""
    D_of_head = None if call.D is None or not _is_shared(call.D, -1) else call.D[:, 0].float()
    D_of_channel = None if D_of_head is not None else call.D
    params = SsmLayerParams(
        A=call.A[:, 0, 0].float(),
        D=D_of_head,
        dt_bias=None if call.dt_bias is None else call.dt_bias[:, 0].float(),
        dt_softplus=call.dt_softplus,
        dt_limit=_NO_LIMIT,
    )
    x, B, C, z = call.x, call.B, call.C, call.z
    y = out
    direct = D_of_channel is None and out.is_contiguous() and _one_dtype(call, out)
    if not direct:
        x, B, C = x.float(), B.float(), C.float()
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        z = None
    dt = call.dt[..., 0]
    if x.shape[1] == 1 and steps.states is None and steps.write_state:
        kernels.state_step(
            call.state,
            x[:, 0],
            dt[:, 0],
            B[:, 0],
            C[:, 0],
            params=params,
            state_slots=slots,
            out=y[:, 0],
            z=None if z is None else z[:, 0],
        )
    else:
        kernels.state_steps(
            call.state,
            x,
            dt,
            B,
            C,
            params=params,
            state_slots=slots,
            out=y,
            z=z,
            step_states=steps.states,
            step_slots=steps.slots,
            parents=steps.parents,
            write_state=steps.write_state,
        )
    if not direct:
        if D_of_channel is not None:
            y += D_of_channel.float() * x
        if call.z is not None:
            y *= silu(call.z.float())
        _copy_live(y, slots, out)


def _untied(
    call: _Call,
    slots: torch.Tensor,
    out: torch.Tensor,
    asked: Mapping[str, object],
    kernels: Kernels,
) -> None:
    """Mamba-1, or parameters that nobody expanded: one token."""
    for name, value in asked.items():
        if value is not None:
            raise ValueError(f"{name}: only where A, dt and dt_bias are expanded over dim")
    if call.x.shape[1] != 1:
        raise ValueError("x: several tokens only where A, dt and dt_bias are expanded over dim")
    y = torch.empty_like(call.x, dtype=torch.float32, memory_format=torch.contiguous_format)
    kernels.state_step_untied(
        call.state,
        call.x[:, 0].float(),
        call.dt[:, 0],
        call.B[:, 0].float(),
        call.C[:, 0].float(),
        A=call.A.float(),
        D=None if call.D is None else call.D.float(),
        dt_bias=None if call.dt_bias is None else call.dt_bias.float(),
        dt_softplus=call.dt_softplus,
        state_slots=slots,
        out=y[:, 0],
        z=None if call.z is None else call.z[:, 0].float(),
    )
    _copy_live(y, slots, out)


def _copy_live(y: torch.Tensor, slots: torch.Tensor, out: torch.Tensor) -> None:
    """Write the rows that are not padding, without asking the device which they are."""
    live = (slots != PAD_SLOT)[:, None, None, None]
    out.copy_(torch.where(live, y.to(out.dtype), out))


def _slots(call: _Call, indices: torch.Tensor | None, pad_slot_id: int) -> torch.Tensor:
    """(batch,), PAD_SLOT in padding rows."""
    if indices is None:
        return torch.arange(len(call.x), dtype=torch.int32, device=call.x.device)
    if pad_slot_id == PAD_SLOT:
        return indices
    return torch.where(indices == pad_slot_id, PAD_SLOT, indices)


def _kept_steps(
    call: _Call,
    buffer: torch.Tensor | None,
    cache_steps: int | None,
    parents: torch.Tensor | None,
    rows: torch.Tensor | None,
    *,
    write_state: bool,
) -> _KeptSteps:
    batch, num_steps = call.x.shape[:2]
    if buffer is None:
        for name, value in (
            ("retrieve_parent_token", parents),
            ("intermediate_state_indices", rows),
        ):
            if value is not None:
                raise ValueError(f"{name} needs intermediate_states_buffer")
        return _KeptSteps(None, None, None, write_state)
    if cache_steps is not None and (buffer.dim() != 5 or cache_steps != buffer.shape[1]):
        raise ValueError(f"cache_steps: {cache_steps}, the buffer has {tuple(buffer.shape)}")
    if buffer.dim() != 5 or buffer.shape[1] < num_steps:
        raise ValueError(
            f"intermediate_states_buffer: shape {tuple(buffer.shape)}, expected 5 dimensions and "
            f"{num_steps} steps"
        )
    shape = (*buffer.shape[:2], *call.state.shape[1:])
    check_tensor("intermediate_states_buffer", buffer, shape, _FLOATS)
    check_pool("intermediate_states_buffer", buffer)
    if rows is not None:
        check_tensor("intermediate_state_indices", rows, (batch,), _INTEGERS)
    if parents is not None:
        check_tensor("retrieve_parent_token", parents, (batch, num_steps), _INTEGERS)
    return _KeptSteps(buffer, rows, parents, write_state)


def _check(call: _Call, indices: torch.Tensor | None) -> None:
    if call.state.dim() != 4:
        raise ValueError(f"state: {call.state.dim()} dimensions, expected 3 or 4")
    slots, nheads, dim, dstate = call.state.shape
    check_tensor("state", call.state, (slots, nheads, dim, dstate), _FLOATS)
    check_pool("state", call.state)
    if call.x.dim() != 4 or call.B.dim() != 4:
        raise ValueError(f"x, B: {call.x.dim()} and {call.B.dim()} dimensions, expected 2 to 4")
    batch, num_steps = call.x.shape[:2]
    ngroups = call.B.shape[2]
    check_tensor("x", call.x, (batch, num_steps, nheads, dim), _FLOATS)
    check_tensor("dt", call.dt, (batch, num_steps, nheads, dim), _FLOATS)
    check_tensor("A", call.A, (nheads, dim, dstate), _FLOATS)
    check_tensor("B", call.B, (batch, num_steps, ngroups, dstate), _FLOATS)
    if not ngroups or nheads % ngroups:
        raise ValueError(f"B: {nheads} heads do not divide into {ngroups} groups")
    check_tensor("C", call.C, (batch, num_steps, ngroups, dstate), _FLOATS)
    if call.D is not None:
        check_tensor("D", call.D, (nheads, dim), _FLOATS)
    if call.z is not None:
        check_tensor("z", call.z, (batch, num_steps, nheads, dim), _FLOATS)
    if call.dt_bias is not None:
        check_tensor("dt_bias", call.dt_bias, (nheads, dim), _FLOATS)
    if not num_steps:
        raise ValueError("x: no tokens")
    if indices is not None:
        check_tensor("state_batch_indices", indices, (batch,), _INTEGERS)
    elif batch > slots:
        raise ValueError(f"state: {slots} slots, x has {batch} rows")


def _one_dtype(call: _Call, out: torch.Tensor) -> bool:
    tensors = (call.B, call.C, call.z, out)
    return all(tensor is None or tensor.dtype == call.x.dtype for tensor in tensors)


def _is_shared(tensor: torch.Tensor, dim: int) -> bool:
    """Whether all elements along ``dim`` are one element in memory."""
    return tensor.shape[dim] == 1 or tensor.stride(dim) == 0


def _per_token(tensor: torch.Tensor) -> torch.Tensor:
    """A view with a head or group dimension, and one of tokens before it."""
    if tensor.dim() == 2:
        tensor = tensor[:, None]
    return tensor[:, None] if tensor.dim() == 3 else tensor


def _per_head(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return tensor[None] if tensor is not None and tensor.dim() == 1 else tensor
