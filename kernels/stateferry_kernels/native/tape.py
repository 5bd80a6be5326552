"""A step's calls into the library, recorded once and made again by one call: a decode step's, or a
verification's.

A model's layers make the same calls in every step of as many rows: what differs lies behind the
plans. So the calls are noted while a step runs as usual, with whatever memory they touch, and the
next step only fills in its plans. The library makes them with one team of threads (src/team.h):
neither Python nor a parallel region stands between two of them.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import zip_longest
from struct import Struct
from typing import Any, TypeVar

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from stateferry_kernels.attention.cpu_ops import refill_kv_plan
from stateferry_kernels.draft_plans import VerifyPlan
from stateferry_kernels.guards import check_decode_plan, check_kv_plan, check_verify_plan
from stateferry_kernels.kv_layer import KvLayer, KvPlan
from stateferry_kernels.layer_state import DraftRows, LayerState
from stateferry_kernels.native.arguments import refill_decode, refill_verify
from stateferry_kernels.native.library import Native, native
from stateferry_kernels.plans import DecodePlan

_Result = TypeVar("_Result")
StepPlan = DecodePlan | VerifyPlan

# As native/src/packed_abi.h counts them.
_KINDS = {
    name: kind
    for kind, name in enumerate(
        "linear norm add_norm activation rotary cast attention conv_row decode_row conv_verify "
        "verify".split()
    )
}
_MOST_ARGUMENTS = 5
_CALL = Struct(f"{1 + _MOST_ARGUMENTS}q")

# What makes a tensor without computing: memory, and other views of it.
_HARMLESS = frozenset(
    "empty empty_strided view _unsafe_view _reshape_alias alias detach as_strided split "
    "split_with_sizes slice select transpose t permute expand unsqueeze squeeze unbind".split()
)


class Tape:
    """Recorded calls. What they read and write stays alive with it."""

    def __init__(self, recorder: Recorder, calls: bytes, alive: list[Any], num_bytes: int) -> None:
        self._plan, self._kv_plan = recorder.plan, recorder.kv_plan
        self._states, self._kv, self._drafts = recorder.states, recorder.kv, recorder.drafts
        self._calls, self._alive = calls, alive
        self.num_bytes = num_bytes  # of the tensors in between

    def replay(self, plan: StepPlan, kv_plan: KvPlan) -> None:
        """Make the calls again, for other sequences, in as many rows as before. Raises ValueError
        on plans that do not fit the pools."""
        for state, drafts in zip(self._states, self._drafts, strict=True):
            if isinstance(plan, DecodePlan):
                check_decode_plan(plan, state)
            else:
                assert drafts is not None
                check_verify_plan(plan, state, drafts)
        for layer in self._kv:
            check_kv_plan(kv_plan, layer)
        if isinstance(plan, DecodePlan):
            assert isinstance(self._plan, DecodePlan)
            refill_decode(self._plan, plan)
        else:
            assert isinstance(self._plan, VerifyPlan)
            refill_verify(self._plan, plan)
        if self._kv:
            refill_kv_plan(self._kv_plan, kv_plan)
        count = len(self._calls) // _CALL.size
        if native().replay(self._calls, count, torch.get_num_threads()):
            raise IndexError("positions: one is not in the tables that were recorded")


class Recorder:
    """Records one step. ``plan`` and ``kv_plan`` are its own copies: the step must use these."""

    def __init__(
        self,
        plan: StepPlan,
        kv_plan: KvPlan,
        states: Sequence[LayerState],
        kv: Sequence[KvLayer],
        drafts: Sequence[DraftRows] = (),
    ) -> None:
        """drafts: where a verification's rows go, by layer."""
        self.plan: StepPlan = replace(plan, cache={})
        self.kv_plan = replace(kv_plan, cache={})
        # Layers whose pools are of one size check a plan alike.
        sizes = {
            (s.grid, s.ssm_state.shape[0], s.tail_dt.shape[0]): (s, rows)
            for s, rows in zip_longest(states, drafts)
        }
        self.states = tuple(state for state, _ in sizes.values())
        self.drafts = tuple(rows for _, rows in sizes.values())
        pages = {(layer.keys.shape[0], layer.page_tokens): layer for layer in kv}
        self.kv = tuple(pages.values())

    def record(self, run: Callable[[], _Result]) -> tuple[_Result, Tape | None]:
        """Run it. Returns its result and the tape, or None if it computed anything that the library
        did not, or that cannot be made again."""
        calls: list[bytes] = []
        alive: list[Any] = [*self.states, *self.kv]
        replayable = True

        def notice(name: str, arguments: tuple[Any, ...]) -> None:
            nonlocal replayable
            if name not in _KINDS:
                replayable = False
                return
            given = arguments[:-1]  # without the number of threads
            alive.append(given)
            addresses = [_address(argument) for argument in given]
            calls.append(
                _CALL.pack(_KINDS[name], *addresses, *[0] * (_MOST_ARGUMENTS - len(given)))
            )

        watch = _Torch()
        with _calls_noticed(native(), notice), _Addresses(alive), watch:
            result = run()
        if not replayable or watch.computed:
            return result, None
        return result, Tape(self, b"".join(calls), alive, watch.num_bytes)


def _address(argument: Any) -> int:
    if isinstance(argument, bytes):
        return ctypes.cast(ctypes.c_char_p(argument), ctypes.c_void_p).value or 0
    return ctypes.addressof(argument)


class _Torch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees whether torch computes anything, and how much memory is asked for."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_bytes = 0
        self.computed = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # True would import torch's compiler, for seconds, in the middle of somebody's step.
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.computed |= name not in _HARMLESS
        if name.startswith("empty"):
            self.num_bytes += result.nbytes
        return result


class _Addresses(TorchFunctionMode):
    """Keeps every tensor whose address is asked for."""

    def __init__(self, alive: list[Any]) -> None:
        super().__init__()
        self._alive = alive

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.data_ptr:
            self._alive.append(args[0])
        return func(*args, **(kwargs or {}))


_one_at_a_time = threading.Lock()


@contextmanager
def _calls_noticed(
    library: Native, notice: Callable[[str, tuple[Any, ...]], None]
) -> Iterator[None]:
    """Show this thread's calls to ``notice``; others' pass by."""
    owner = threading.get_ident()

    def noticed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            if threading.get_ident() == owner:
                notice(name, arguments)
            return function(*arguments)

        return call

    with _one_at_a_time:
        plain = library.functions
        try:
            for name, function in plain.items():
                setattr(library, name, noticed(name, function))
            yield
        finally:
            for name, function in plain.items():
                setattr(library, name, function)
