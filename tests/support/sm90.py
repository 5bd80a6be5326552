"""Compile Triton kernels for an H100 without having one. Not for a process that interprets them."""

from __future__ import annotations

import inspect
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

TARGET = GPUTarget("cuda", 90, 32)
TYPES = {"fp32": "*fp32", "bf16": "*bf16", "fp16": "*fp16", "i32": "*i32", "i64": "*i64"}


def compile_for_h100(kernel: Any, *, num_warps: int = 4, **arguments: Any) -> Any:
    """The compiled kernel. arguments: for constexprs and absent pointers their value, for pointers
    and numbers their type ("*bf16", "i32", "fp32"); numbers that are left out are i32."""
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
            if value.startswith("*") or value == "i64":
                attributes[(position,)] = [["tt.divisibility", 16]]
    source = triton.compiler.ASTSource(
        fn=kernel, signature=signature, constexprs=constexprs, attrs=attributes
    )
    return triton.compile(source, target=TARGET, options={"num_warps": num_warps})
