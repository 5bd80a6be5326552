"""A program: what the C++ library in a directory computes, as one digest per case.

    python -P native_digest.py DIRECTORY VARIANT

Outputs and pools of every operation, in every combination of dtypes, to the byte.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

from stateferry_kernels.dispatch import select_kernels
from stateferry_kernels.native import library
from support.kv_case import Reader, Sizes, make_rows
from support.random_walk import Walk
from support.ssm_case import Shape, all_pools, make_layer, make_tokens
from support.step_case import make_step_case, step_arguments

DTYPES = (torch.float32, torch.bfloat16)
# Whole vectors and rests of them, in every dimension.
SHAPES = (
    Shape(nheads=6, headdim=20, dstate=12, ngroups=3, grid=8),
    Shape(nheads=3, headdim=72, dstate=48, ngroups=1, grid=16),
)


def digest(tensors: Iterable[torch.Tensor]) -> str:
    """NaN payloads do not count: which NaN an operation returns is no part of its contract."""
    total = hashlib.sha256()
    for tensor in tensors:
        clean = torch.where(tensor.isnan(), torch.full_like(tensor, math.nan), tensor)
        total.update(clean.contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def digests() -> dict[str, str]:
    kernels, found = select_kernels("cpu"), {}
    for dtype in DTYPES:
        for state_dtype in DTYPES:
            for number, shape in enumerate(SHAPES):
                layer = make_layer(shape, dtype=dtype, state_dtype=state_dtype, seed=number)
                tokens = [make_tokens(layer, 60 + k, seed=k, with_z=True) for k in range(2)]
                walk = Walk(layer, kernels, tokens, random.Random(number).randint)
                outputs = walk.run()
                pools = all_pools(walk.walker.state, walk.walker.drafts).values()
                found[f"walk {number} {dtype} {state_dtype}"] = digest([*outputs, *pools])
            for how in ("chain", "states", "tree"):
                case = make_step_case(steps=5, dtype=dtype, state_dtype=state_dtype, with_z=True)
                given = step_arguments(case, how, state_dtype)
                out, pool = case.run(kernels.state_steps, **given)
                kept = [given["step_states"]] if "step_states" in given else []
                found[f"steps {how} {dtype} {state_dtype}"] = digest([out, pool, *kept])
        found |= rows_of(dtype)
    x = torch.cat([torch.linspace(-120, 120, 100_003), torch.tensor([math.inf, -math.inf])])
    for kind in range(3):
        out = torch.empty_like(x)
        library.native().elementwise(x.data_ptr(), x.numel(), kind, out.data_ptr())
        found[f"elementwise {kind}"] = digest([out])
    return found


def rows_of(dtype: torch.dtype) -> dict[str, str]:
    """Projections, norms, activations and attention."""
    kernels, generator = select_kernels("cpu"), torch.Generator().manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator).to(dtype)

    found = {}
    for inputs, outputs in ((1, 3), (33, 17), (96, 300), (768, 40)):
        x, weight, bias = normal(70, inputs), normal(outputs, inputs), normal(outputs)
        results = [kernels.linear(x[:n], weight, bias) for n in (1, 2, 3, 5, 6, 40, 70)]
        found[f"linear {inputs} {outputs} {dtype}"] = digest(results)
    x, z, weight = normal(20, 75), normal(20, 75), normal(75)
    norms = [
        kernels.rms_norm(x, weight, 1e-5),
        kernels.gated_rms_norm(x, z, weight, 1e-5, 25),
        kernels.norm_then_gate(x, z, weight, 1e-5, 25),
        *kernels.add_rms_norm(x, z, weight, 1e-5),
    ]
    cos, sin = torch.cos(normal(9, 11).float()), torch.sin(normal(9, 11).float())
    positions = torch.arange(20) % 9
    single = [
        kernels.silu_mul(x, z),
        kernels.relu2(x),
        kernels.rotary(x.view(20, 3, 25), cos=cos, sin=sin, positions=positions),
    ]
    found |= {f"norms {dtype}": digest(norms), f"activations {dtype}": digest(single)}
    for number, sizes in enumerate((Sizes(6, 2, 20, page_tokens=5), Sizes(12, 4, 64))):
        rows = make_rows(sizes, 200, dtype)
        reader = Reader(kernels, sizes, len(rows), dtype)
        found[f"attention {number} {dtype}"] = digest([reader.walk(rows, (150, 151, 152))])
    return found


def main() -> None:
    directory, name = Path(sys.argv[1]), sys.argv[2]
    # Of several builds that run here the library takes the best; this program takes the one asked.
    library.VARIANTS = tuple(v for v in library.VARIANTS if v.name == name)
    library.use_directory(directory)
    json.dump(digests(), sys.stdout)


if __name__ == "__main__":
    main()
