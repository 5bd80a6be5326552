"""Copy, clear and scatter of slots, torch and Triton, against loops: interpreted here, on the GPU
where there is one."""

from __future__ import annotations

import os
from collections.abc import Callable
from types import ModuleType

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

pytest.importorskip("triton")

from stateferry_kernels.layer_state import PAD_SLOT, StateGeometry  # noqa: E402
from stateferry_kernels.slots import torch_ops, triton_ops  # noqa: E402

SLOTS, LAYERS, ROWS, STEPS = 7, 3, 5, 4
# nheads, headdim, dstate, conv_dim, d_conv: the second has more words per layer than a block, the
# last one no window.
SIZES = {
    "plain": (2, 3, 5, 16, 4),
    "several blocks": (3, 20, 41, 2111, 2),
    "one tap": (1, 4, 2, 8, 1),
}
DTYPES = {
    "fp32": (torch.float32, torch.float32),
    "bf16 columns": (torch.float32, torch.bfloat16),
    "16 bits": (torch.float16, torch.bfloat16),
}
Pools = tuple[torch.Tensor, torch.Tensor]

pytestmark = pytest.mark.parametrize("ops", [torch_ops, triton_ops], ids=["torch", "triton"])


def random_bits(*size: int, dtype: torch.dtype) -> torch.Tensor:
    """Any bits, those of NaNs with a payload among them, with room between the first dimension's
    rows."""
    words = torch.int32 if dtype is torch.float32 else torch.int16
    info = torch.iinfo(words)
    padded = (size[0], 2, *size[1:])
    return torch.randint(info.min, info.max, padded, dtype=words).to(DEVICE).view(dtype)[:, 1]


def pools(name: str, dtypes: str = "fp32", num_steps: int | None = None) -> Pools:
    nheads, headdim, dstate, conv_dim, d_conv = SIZES[name]
    torch.manual_seed(0 if num_steps is None else 1)
    lead = (SLOTS, LAYERS) if num_steps is None else (ROWS, LAYERS, num_steps)
    state_dtype, dtype = DTYPES[dtypes]
    return (
        random_bits(*lead, nheads, headdim, dstate, dtype=state_dtype),
        random_bits(*lead, conv_dim, d_conv - 1, dtype=dtype),
    )


def indices(*numbers: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(numbers, dtype=dtype, device=DEVICE)


def check(
    mine: Pools, change: Callable[[torch.Tensor, int], None], call: Callable[[], None]
) -> None:
    """The call does to the bits of both pools what ``change(bits, 0 or 1)`` does."""
    wanted = []
    for which, pool in enumerate(mine):
        bits = as_bits(pool).clone()
        change(bits, which)
        wanted.append(bits)
    call()
    for pool, bits in zip(mine, wanted, strict=True):
        assert torch.equal(as_bits(pool), bits)


def as_bits(pool: torch.Tensor) -> torch.Tensor:
    return pool.view(torch.int32 if pool.element_size() == 4 else torch.int16)


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("dtypes", DTYPES)
def test_copy(ops: ModuleType, name: str, dtypes: str) -> None:
    mine = pools(name, dtypes)
    src, dst = indices(1, PAD_SLOT, 1, 4, 0), indices(5, 2, 3, PAD_SLOT, 6, dtype=torch.int64)

    def change(bits: torch.Tensor, _: int) -> None:
        bits[5], bits[3], bits[6] = bits[1], bits[1], bits[0]

    check(mine, change, lambda: ops.copy_slots(*mine, src_slots=src, dst_slots=dst))


@pytest.mark.parametrize("name", SIZES)
def test_clear(ops: ModuleType, name: str) -> None:
    mine = pools(name, "bf16 columns")

    def change(bits: torch.Tensor, _: int) -> None:
        bits[[2, 6]] = 0

    check(mine, change, lambda: ops.clear_slots(*mine, state_slots=indices(6, PAD_SLOT, 2)))


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("dtypes", DTYPES)
def test_scatter(ops: ModuleType, name: str, dtypes: str) -> None:
    """One row serves two entries; every way of leaving an entry out."""
    mine, kept = pools(name, dtypes), pools(name, dtypes, STEPS)
    rows = indices(4, 0, 4, PAD_SLOT, 1, 2)
    steps = indices(3, 0, 1, 1, -1, 2)
    dst = indices(1, 6, 2, 3, 4, PAD_SLOT)

    def change(bits: torch.Tensor, which: int) -> None:
        after = as_bits(kept[which])
        bits[1], bits[6], bits[2] = after[4, :, 3], after[0, :, 0], after[4, :, 1]

    check(
        mine,
        change,
        lambda: ops.scatter_steps(
            *mine,
            step_states=kept[0],
            step_windows=kept[1],
            step_rows=rows,
            steps=steps,
            dst_slots=dst,
        ),
    )


def test_nothing_to_do(ops: ModuleType) -> None:
    mine = pools("plain")
    kept = pools("plain", num_steps=STEPS)
    none = indices()

    def call() -> None:
        ops.copy_slots(*mine, src_slots=none, dst_slots=none)
        ops.clear_slots(*mine, state_slots=indices(PAD_SLOT))
        ops.scatter_steps(
            *mine,
            step_states=kept[0],
            step_windows=kept[1],
            step_rows=none,
            steps=none,
            dst_slots=none,
        )

    check(mine, lambda *_: None, call)


def test_the_pool_of_a_worker(ops: ModuleType) -> None:
    """The layout that is served from: a layer's view sees what was copied into its slot."""
    from stateferry.cache.state_pool import StatePool

    geometry = StateGeometry(
        num_layers=2, nheads=2, headdim=3, dstate=4, ngroups=1, d_conv=4, conv_dim=14
    )
    pool = StatePool(
        geometry, grid=4, dtype=torch.bfloat16, num_slots=4, num_pages=1, device=DEVICE
    )
    pool.poison()
    whole = [pool._tensors["ssm_state"], pool._tensors["conv_state"]]
    for number, layer in enumerate(pool.layers):
        layer.ssm_state[1] = number + 1
        layer.conv_state[1] = number + 10
    ops.copy_slots(*whole, src_slots=indices(1), dst_slots=indices(3))
    ops.clear_slots(*whole, state_slots=indices(1))
    for number, layer in enumerate(pool.layers):
        assert (layer.ssm_state[3] == number + 1).all()
        assert (layer.conv_state[3] == number + 10).all()
        assert (layer.ssm_state[1] == 0).all() and (layer.conv_state[1] == 0).all()
        assert layer.ssm_state[2].isnan().all() and layer.conv_state[2].isnan().all()


def test_refuses(ops: ModuleType) -> None:
    ssm_state, conv_state = pools("plain")
    states, windows = pools("plain", num_steps=STEPS)
    one = indices(1)
    with pytest.raises(ValueError, match="dst_slots"):
        ops.copy_slots(ssm_state, conv_state, src_slots=one, dst_slots=indices(1, 2))
    with pytest.raises(TypeError, match="state_slots"):
        ops.clear_slots(ssm_state, conv_state, state_slots=one.float())
    with pytest.raises(ValueError, match="conv_state"):
        ops.clear_slots(ssm_state, conv_state[:, :2].contiguous(), state_slots=one)
    with pytest.raises(ValueError, match="ssm_state"):
        ops.clear_slots(ssm_state[:, 0], conv_state, state_slots=one)
    with pytest.raises(ValueError, match="ssm_state"):
        ops.clear_slots(ssm_state.mT.contiguous().mT, conv_state, state_slots=one)
    for step_states, step_windows, error in (
        (states.double(), windows, TypeError),
        (states[:, :2].contiguous(), windows, ValueError),
        (states, windows[:, :, :2].contiguous(), ValueError),
    ):
        with pytest.raises(error, match="step_"):
            ops.scatter_steps(
                ssm_state,
                conv_state,
                step_states=step_states,
                step_windows=step_windows,
                step_rows=one,
                steps=one,
                dst_slots=one,
            )
