"""The recorder's promises, and those of the threads that the library's calls share."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from stateferry_kernels.kv_layer import KvPlan, KvSequence
from stateferry_kernels.native.tape import Recorder
from stateferry_kernels.plans import CommitPlan, DecodePlan
from support.backends import kernels_of, native_or_skip, torch_threads
from support.kv_case import Sizes, make_rows, poisoned_layer
from support.ssm_case import Shape, make_layer, poisoned_state

SHAPE = Shape()
PLAN = DecodePlan(grid=16, state_slots=(1,), tail_pages=(0,), tail_rows=(0,))
NO_KV = KvPlan(16, (KvSequence(0, 1, ()),))


@pytest.fixture(autouse=True)
def native() -> None:
    native_or_skip()


def draw(*size: int) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(sum(size)))


def test_what_the_calls_touch_stays() -> None:
    kernels = kernels_of("cpu")
    x = draw(2, 64)

    mine = {"weight": draw(96, 64), "norm": torch.full((48,), 2.0)}

    def run() -> torch.Tensor:
        gate, up = kernels.linear(x, mine["weight"], None).split_with_sizes([48, 48], 1)
        return kernels.rms_norm(kernels.silu_mul(gate, up), mine["norm"], 1e-5)

    result, tape = Recorder(PLAN, NO_KV, (), ()).record(run)
    assert tape is not None
    expected = run()
    assert torch.equal(result, expected)
    mine.clear()
    gc.collect()
    clutter = [torch.full((n,), float("nan")) for n in (48, 96, 192, 96 * 64) for _ in range(50)]
    result.fill_(float("nan"))
    tape.replay(PLAN, NO_KV)
    assert torch.equal(result, expected)
    # Inputs are read anew.
    x.mul_(2)
    tape.replay(PLAN, NO_KV)
    assert not torch.equal(result, expected)
    del clutter


@pytest.mark.parametrize(
    "compute",
    [
        lambda t: t + 1,
        lambda t: t.to(torch.bfloat16),
        lambda t: t.t().contiguous(),
        lambda t: t.clone(),
        lambda t: t.zero_(),
        lambda t: torch.zeros(3),
        lambda t: t.sum().item(),
    ],
)
def test_torch_may_not_compute(compute: Callable[[torch.Tensor], object]) -> None:
    kernels, x = kernels_of("cpu"), draw(2, 32)
    ran = []

    def run() -> None:
        ran.append(compute(kernels.relu2(x)))

    assert Recorder(PLAN, NO_KV, (), ()).record(run)[1] is None
    assert len(ran) == 1


def test_a_commit_is_not_for_tapes() -> None:
    layer = make_layer(SHAPE)
    state = poisoned_state(layer)
    plan = CommitPlan(state.grid, (0,), (1,), (0,), (1,))
    kernels = kernels_of("cpu")

    def run() -> None:
        kernels.commit(params=layer.ssm, plan=plan, state=state)

    assert Recorder(PLAN, NO_KV, (), ()).record(run)[1] is None


def test_other_threads_calls_pass_by() -> None:
    kernels, x = kernels_of("cpu"), draw(2, 32)
    outs: list[torch.Tensor] = []

    def run() -> None:
        other = threading.Thread(target=lambda: outs.append(kernels.relu2(x)))
        other.start()
        other.join()

    _, tape = Recorder(PLAN, NO_KV, (), ()).record(run)
    assert tape is not None and torch.equal(outs[0], kernels.relu2(x))
    outs[0].zero_()
    tape.replay(PLAN, NO_KV)
    assert not outs[0].any()


def test_plans_are_checked_again() -> None:
    layer = make_layer(SHAPE)
    state = poisoned_state(layer)
    slots, pages = state.ssm_state.shape[0], state.tail_dt.shape[0]
    state.conv_state[1] = 0
    xBC = draw(1, SHAPE.conv_dim)
    out = torch.empty_like(xBC)
    kernels = kernels_of("cpu")
    recorder = Recorder(DecodePlan(state.grid, (1,), (0,), (0,)), NO_KV, (state,), ())
    kernels.causal_conv1d_row(xBC, conv=layer.conv, plan=recorder.plan, state=state, out=out)
    _, tape = recorder.record(
        lambda: kernels.causal_conv1d_row(
            xBC, conv=layer.conv, plan=recorder.plan, state=state, out=out
        )
    )
    assert tape is not None
    for bad, message in (
        (DecodePlan(state.grid, (slots,), (0,), (0,)), "state_slots"),
        (DecodePlan(state.grid, (1,), (pages,), (0,)), "tail_pages"),
        (DecodePlan(2 * state.grid, (1,), (0,), (0,)), "grid"),
        (DecodePlan(state.grid, (1, 1), (0, 1), (0, 0)), "rows"),
    ):
        with pytest.raises(ValueError, match=message):
            tape.replay(bad, NO_KV)
    tape.replay(DecodePlan(state.grid, (1,), (1,), (2,)), NO_KV)
    assert torch.equal(state.tail_xBC[1, 2], xBC[0])


def test_attention_sees_the_new_pages() -> None:
    sizes = Sizes()
    kernels, layer = kernels_of("cpu"), poisoned_layer(sizes, 4, torch.float32)
    rows = make_rows(sizes, 1, torch.float32)
    q, k, v = rows.q, rows.k, rows.v
    out = torch.empty_like(q)
    size = layer.page_tokens
    recorder = Recorder(PLAN, KvPlan(size, (KvSequence(0, 1, (0,)),)), (), (layer,))

    def run() -> None:
        kernels.attention(q, k, v, plan=recorder.kv_plan, kv=layer, scale=0.5, out=out)

    _, tape = recorder.record(run)
    assert tape is not None
    # On the second place of page 2, whose first holds something else.
    layer.keys[2, :, 0], layer.values[2, :, 0] = k[0] * 0.5, v[0] * 3
    tape.replay(PLAN, KvPlan(size, (KvSequence(1, 1, (2,)),)))
    found = out.clone()
    assert torch.equal(layer.keys[2, :, 1], k[0])
    plan = KvPlan(size, (KvSequence(1, 1, (2,)),))
    kernels.attention(q, k, v, plan=plan, kv=layer, scale=0.5, out=out)
    assert torch.equal(found, out) and not torch.equal(found[0, 0], v[0, 0])
    with pytest.raises(ValueError, match="pages"):
        tape.replay(PLAN, KvPlan(size, (KvSequence(0, 1, (layer.keys.shape[0],)),)))
    with pytest.raises(ValueError, match="rows"):
        pair = (KvSequence(0, 1, (0,)), KvSequence(0, 1, (1,)))
        tape.replay(PLAN, KvPlan(size, pair))


@pytest.mark.parametrize("threads", [2, 3, 8])
def test_callers_have_threads_of_their_own(threads: int) -> None:
    """Several callers at once, more threads than there are cores, teams that grow and end."""
    linear = kernels_of("cpu").linear
    weight = draw(640, 256)
    inputs = [draw(rows, 256) for rows in (1, 2, 5, 64)]
    with torch_threads(1):
        expected = [linear(x, weight, None) for x in inputs]

    def call(seed: int) -> bool:
        return all(
            torch.equal(linear(inputs[(seed + n) % 4], weight, None), expected[(seed + n) % 4])
            for n in range(100)
        )

    with torch_threads(threads):
        for _ in range(2):
            with ThreadPoolExecutor(4) as pool:
                assert all(pool.map(call, range(4)))


def test_a_forked_process_goes_on() -> None:
    """Its parent's threads are not in it; it gets its own."""
    code = (
        "import os, torch\n"
        "from stateferry_kernels.dispatch import select_kernels\n"
        "torch.set_num_threads(2)\n"
        "linear = select_kernels('cpu').linear\n"
        "x, weight = torch.randn(2, 256), torch.randn(640, 256)\n"
        "before = linear(x, weight, None)\n"
        "def same(): return all(linear(x, weight, None).equal(before) for _ in range(200))\n"
        "child = os.fork()\n"
        "if not child: os._exit(0 if same() else 3)\n"
        "good = same()\n"
        "raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) or not good)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    command = [sys.executable, "-P", "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_recording_does_not_import_torchs_compiler() -> None:
    """That takes seconds, once, and would come in the middle of somebody's step."""
    program = (
        "import sys, torch\n"
        "from stateferry_kernels.native.tape import _Torch\n"
        "with _Torch() as watch:\n"
        "    torch.empty(3).view(3)\n"
        "assert watch.num_bytes == 12 and 'torch._dynamo' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-P", "-c", program], check=True)
