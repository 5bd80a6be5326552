"""Compile Triton kernels for an H100 without having one. Not for a process that interprets them."""

from __future__ import annotations

import inspect
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

TARGET = GPUTarget("cuda", 90, 32)


def compile_for_h100(
    kernel: Any,
    *,
    num_warps: int = 4,
    num_stages: int = 3,
    stack_bytes: int = 0,
    **arguments: Any,
) -> Any:
    """The compiled kernel. arguments: for constexprs and absent pointers their value, for pointers
    and numbers their type ("*bf16", "i32", "fp32"); numbers that are left out are i32. Pointers and
    strides are multiples of 16, as they are in a pool. stack_bytes: what a thread may keep in
    memory for want of registers."""
    names = list(inspect.signature(kernel.fn).parameters)
    constants = {p.name for p in kernel.params if p.is_constexpr}
    signature, constexprs, attributes = {}, {}, {}
    for position, name in enumerate(names):
        value = arguments.get(name, "i32")
        if name in constants or value is None:
            signature[name] = "constexpr"
            constexprs[name] = value
        else:
            signature[name] = value
            is_one = name in ("weight_stride_tap", "A_stride_state")
            if value.startswith("*") or ("stride" in name and not is_one):
                attributes[(position,)] = [["tt.divisibility", 16]]
    source = triton.compiler.ASTSource(
        fn=kernel, signature=signature, constexprs=constexprs, attrs=attributes
    )
    options = {"num_warps": num_warps, "num_stages": num_stages}
    compiled = triton.compile(source, target=TARGET, options=options)
    spilled = _stack_bytes(compiled.asm["cubin"])
    assert spilled <= stack_bytes, f"{kernel.fn.__name__} spills registers: {spilled} bytes"
    return compiled


def _stack_bytes(cubin: bytes) -> int:
    """Bytes per thread that the program keeps in memory for want of registers."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    return sum(int(size) for size in re.findall(r"STACK:(\d+)", usage.stdout + usage.stderr))
