"""Every kernel compiles for an H100 as it is served with, and spills no register."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

# Not imported here: other tests of this process want it interpreted.
pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")

ROOT = Path(__file__).parents[2]
PROGRAM = """
from support.sm90 import compile_for_h100
from stateferry_kernels.conv1d import triton_kernels as conv
from stateferry_kernels.conv1d.triton_tables import TILE_TOKENS
from stateferry_kernels.norm.triton_ops import _group_norm_kernel
from stateferry_kernels.slots.triton_ops import _slots_kernel
from stateferry_kernels.state_update import step_kernels as step

sizes = dict(NHEADS=128, HEADDIM=80, DSTATE=128, PER_GROUP=16, SOFTPLUS=True, BLOCK_N=128)
rows = dict(x_ptr="*bf16", dt_ptr="*bf16", B_ptr="*bf16", C_ptr="*bf16", out_ptr="*bf16")
params = dict(A_ptr="*fp32", D_ptr="*fp32", bias_ptr="*fp32", slots_ptr="*i32")
limits = dict(dt_low="fp32", dt_high="fp32")
common = dict(num_warps=1, z_ptr="*bf16", state_stride="i64", **sizes, **rows, **params)
compile_for_h100(
    step.state_step_kernel, state_ptr="*fp32", seed=None, BLOCK_M=4, **common, **limits
)
compile_for_h100(
    step.state_step_kernel, state_ptr="*bf16", seed="i32", BLOCK_M=8, **common, **limits
)
compile_for_h100(
    step.state_step_untied_kernel, state_ptr="*fp16", seed="i32", BLOCK_M=8, **common
)
compile_for_h100(
    step.state_steps_kernel,
    state_ptr="*fp32",
    kept_ptr="*bf16",
    kept_slots_ptr="*i32",
    parents_ptr="*i32",
    seed=None,
    WRITE_STATE=True,
    BLOCK_M=4,
    **common,
    **limits,
)
conv_rows = dict(
    xBC_ptr="*bf16",
    out_ptr="*bf16",
    weight_ptr="*bf16",
    bias_ptr="*bf16",
    conv_ptr="*bf16",
    tail_ptr="*bf16",
    table_ptr="*i64",
    CONV_DIM=12288,
    WINDOW=3,
)
tile = dict(NUM_COLUMNS=8, BLOCK_T=TILE_TOKENS, BLOCK_C=128)
compile_for_h100(conv.extend_kernel, WRITE_TAIL=True, **tile, **conv_rows)
compile_for_h100(
    conv.leave_tail_kernel,
    xBC_ptr="*bf16",
    tail_ptr="*bf16",
    table_ptr="*i64",
    CONV_DIM=12288,
    **tile,
)
compile_for_h100(conv.row_kernel, num_warps=1, BLOCK_C=256, **conv_rows)
compile_for_h100(
    conv.verify_kernel, num_warps=1, BLOCK_C=256, draft_ptr="*bf16", NUM_COLUMNS=10, **conv_rows
)
for gate in ("none", "before", "after"):
    compile_for_h100(
        _group_norm_kernel,
        x_ptr="*bf16",
        z_ptr=None if gate == "none" else "*bf16",
        weight_ptr="*bf16",
        out_ptr="*bf16",
        eps="fp32",
        NUM_GROUPS=8,
        GROUP_SIZE=1280,
        GATE=gate,
        BLOCK=2048,
    )
pools = dict(ssm_ptr="*i32", conv_ptr="*i16", dst_ptr="*i32", NUM_LAYERS=27, BLOCK=2048)
pools |= dict(SSM_SIZE=128 * 80 * 128, CONV_SIZE=12288 * 3)
sources = dict(ssm_src_ptr="*i32", conv_src_ptr="*i16", rows_ptr="*i32")
strides = dict(ssm_stride="i64", ssm_src_stride="i64")
compile_for_h100(_slots_kernel, steps_ptr="*i32", NUM_STEPS=5, **pools, **sources, **strides)
compile_for_h100(_slots_kernel, steps_ptr=None, NUM_STEPS=1, **pools, **sources, **strides)
nothing = dict.fromkeys(sources)
compile_for_h100(_slots_kernel, steps_ptr=None, NUM_STEPS=1, **pools, **nothing, **strides)
print("compiled")
"""

SERVED = """
import triton.language as tl
from support.sm90 import compile_for_h100

served = dict(
    x_ptr="*bf16", B_ptr="*bf16", C_ptr="*bf16", z_ptr=None, out_ptr="*bf16", D_ptr="*fp32",
    tail_x_ptr="*bf16", tail_B_ptr="*bf16", tail_dt_ptr="*fp32", state_ptr="*fp32",
    starts_ptr="*bf16", dt_ptr="*fp32", cumsum_ptr="*fp32", walks_ptr="*i64",
    intervals_ptr="*i64", rows_ptr="*i64", weights_ptr="*bf16", growth_ptr="*fp32",
    A_ptr="*fp32", bias_ptr="*fp32", dt_low="fp32", dt_high="fp32", SOFTPLUS=True,
    tail_x_stride="i64", tail_B_stride="i64", tail_dt_stride="i64", state_stride="i64",
    NUM_COLUMNS=8, DOT=tl.bfloat16, DIRECT=False, GRID=64, BLOCK_T=64,
)
"""

GRID_FORM = """
from stateferry_kernels.ssd import triton_scan_kernels as scan
from stateferry_kernels.ssd.triton_scan_tiles import scan_tile
from stateferry_kernels.state_update import triton_decode_kernels as decode

for heads, P, N, group in ((128, 64, 128, 128), (128, 80, 128, 16)):
    tile = scan_tile(2, P, N, 64, group)
    shape = served | dict(NHEADS=heads, HEADDIM=P, DSTATE=N, PER_GROUP=group)
    compile_for_h100(
        scan.starts_kernel, num_warps=tile.starts_warps, num_stages=tile.starts_stages,
        BLOCK_P=tile.starts_headdim, BLOCK_N=tile.starts_dstate, **shape,
    )
    compile_for_h100(
        scan.outputs_kernel, num_warps=tile.num_warps, num_stages=1, HEADS=tile.heads,
        BLOCK_P=tile.block_headdim, REST_P=tile.rest, BLOCK_R=tile.block_rows, BLOCK_N=N, **shape,
    )
few = scan_tile(2, 64, 128, 64, 80, 80)
compile_for_h100(
    scan.starts_kernel, num_warps=few.starts_warps, num_stages=few.starts_stages,
    BLOCK_P=few.starts_headdim, BLOCK_N=few.starts_dstate,
    **served | dict(NHEADS=80, HEADDIM=64, DSTATE=128, PER_GROUP=80),
)
compile_for_h100(decode.decode_weights_kernel, BLOCK_H=16, BLOCK_N=N, **shape)
compile_for_h100(decode.decode_rows_kernel, BLOCK_P=32, BLOCK_N=N, **shape)
print("compiled")
"""

DRAFTS = """
from stateferry_kernels.ssd.triton_tiles import row_tile
from stateferry_kernels.state_update import triton_verify_kernels as verify
from stateferry_kernels.state_update.triton_verify import fold_block, rows_block

drafts = dict(
    draft_x_ptr="*bf16", draft_B_ptr="*bf16", draft_dt_ptr="*fp32", draft_x_stride="i64",
    draft_B_stride="i64", draft_dt_stride="i64", folds_ptr="*bf16", fold_weights_ptr="*fp32",
    fold_growth_ptr="*fp32", ends_ptr="*i64", paths_ptr="*i64", places_ptr="*i64",
)
for heads, P, N, group in ((128, 64, 128, 128), (128, 80, 128, 16), (24, 128, 256, 24)):
    tile = row_tile(2, P, N, 64, 4)
    shape = served | drafts | dict(
        NHEADS=heads, HEADDIM=P, DSTATE=N, PER_GROUP=group, BLOCK_N=N, BLOCK_H=16,
    )
    compile_for_h100(verify.verify_weights_kernel, num_warps=4 if N == 128 else 8, **shape)
    fold = shape | dict(BLOCK_P=fold_block(P, N))
    compile_for_h100(verify.verify_folds_kernel, num_stages=1, **fold)
    for more, carries in ((False, False), (True, True)):
        compile_for_h100(
            verify.verify_rows_kernel, num_warps=tile.num_warps, num_stages=1, BLOCK_R=32,
            BLOCK_P=rows_block(tile, N, more, carries), MORE=more, CARRIES=carries, **shape,
        )
print("compiled")
"""


ATTENTION = """
import triton.language as tl
from support.sm90 import compile_for_h100
from stateferry_kernels.activation.triton_ops import _activate_kernel
from stateferry_kernels.attention import triton_kernels as attention
from stateferry_kernels.norm.triton_ops import _add_norm_kernel
from stateferry_kernels.rotary.triton_ops import _rotary_kernel

pages = dict(
    keys_ptr="*bf16", values_ptr="*bf16", tokens_ptr="*i64", pages_ptr="*i64",
    keys_stride="i64", values_stride="i64", KV_HEADS=8, PAGE=64,
)
compile_for_h100(
    attention.write_pages_kernel, k_ptr="*bf16", v_ptr="*bf16", HEAD_DIM=128, BLOCK=1024, **pages
)
tiles = ((16, 3, 64, 64), (16, 3, 128, 64), (16, 3, 256, 32), (64, 1, 64, 64), (64, 1, 128, 64))
for rows, stages, head_dim, keys in tiles:
    tile = dict(
        q_ptr="*bf16", out_ptr="*bf16", tiles_ptr="*i64", scale="fp32", GROUP=4, SEGMENT=512,
        HEAD_DIM=head_dim, DOT=tl.bfloat16, ROWS=4, BLOCK_R=rows, BLOCK_K=keys, BLOCK_D=head_dim,
    )
    # The widest keeps addresses of its output there, from before its loops until after them.
    spilled = 128 if rows * head_dim > 64 * 64 else 0
    compile_for_h100(
        attention.attend_kernel, num_stages=stages, stack_bytes=spilled, totals_ptr=None,
        accs_ptr=None, **tile, **pages,
    )
    parts = dict(totals_ptr="*fp32", accs_ptr="*fp32")
    if rows == 16:
        compile_for_h100(attention.attend_kernel, num_stages=stages, **parts, **tile, **pages)
        compile_for_h100(attention.join_kernel, **parts, **tile, **pages)
for up in ("*bf16", None):
    compile_for_h100(
        _activate_kernel, x_ptr="*bf16", up_ptr=up, out_ptr="*bf16", SIZE=14336, BLOCK=1024
    )
compile_for_h100(
    _rotary_kernel, x_ptr="*bf16", cos_ptr="*fp32", sin_ptr="*fp32", positions_ptr="*i64",
    out_ptr="*bf16", HEADS=40, HEAD_DIM=128, HALF=64, BLOCK=8192,
)
compile_for_h100(
    _add_norm_kernel, num_warps=8, x_ptr="*bf16", residual_ptr="*fp32", weight_ptr="*fp32",
    summed_ptr="*fp32", out_ptr="*fp32", eps="fp32", SIZE=8192, BLOCK=8192,
)
print("compiled")
"""


@pytest.mark.parametrize(
    "program",
    [PROGRAM, SERVED + GRID_FORM, SERVED + DRAFTS, ATTENTION],
    ids=["rest", "grid form", "drafts", "attention"],
)
def test_compiles_for_an_h100(tmp_path: Path, program: str) -> None:
    environment = {name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {
        "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in ("kernels", "tests")),
        "TRITON_CACHE_DIR": str(tmp_path),
    }
    result = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout == "compiled\n"
