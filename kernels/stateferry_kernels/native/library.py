"""Which build of the library this processor runs, and its functions.

``pip install`` compiles the same source once for each kind of processor (setup.py); the best one
that the processor can run is loaded at the first use.
"""

from __future__ import annotations

import ctypes
import functools
import platform
from ctypes import c_char_p, c_int64, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stateferry_kernels.native import structs


@dataclass(frozen=True, slots=True)
class Variant:
    """One build: ``flags`` as Linux names the processor features that it needs.

    Builds of equal ``numerics`` give the same bits.
    """

    name: str
    machine: str
    flags: frozenset[str]
    numerics: str = "cpu-2"


_V3 = frozenset("avx2 fma bmi1 bmi2 f16c movbe abm".split())
_V4 = _V3 | frozenset("avx512f avx512bw avx512cd avx512dq avx512vl".split())

# Best first.
VARIANTS = (
    Variant("x86_64_v4_bf16", "x86_64", _V4 | {"avx512_bf16"}, numerics="cpu-bf16-pairs-2"),
    Variant("x86_64_v4", "x86_64", _V4),
    Variant("x86_64_v3", "x86_64", _V3),
    Variant("aarch64", "aarch64", frozenset({"asimd"})),
)

_PLAN = ctypes.POINTER
_LAYER, _PARAMS = _PLAN(structs.LayerStruct), _PLAN(structs.ParamsStruct)
_PACKED = _ROWS = _COLUMNS = c_char_p
_CONV, _DRAFTS = _PLAN(structs.ConvStruct), _PLAN(structs.DraftsStruct)
_EXTEND, _DECODE = _PLAN(structs.ExtendPlanStruct), _PLAN(structs.DecodePlanStruct)
_KV_LAYER, _KV_PLAN = _PLAN(structs.KvLayerStruct), _PLAN(structs.KvPlanStruct)
_VERIFY, _ACCEPT = _PLAN(structs.VerifyPlanStruct), _PLAN(structs.AcceptPlanStruct)

# The library's own count, sf_abi(): a build of older source takes other structs.
ABI = 5

_SIGNATURES: dict[str, list[Any]] = {
    "sf_abi": [],
    "sf_chunk_scan": [_LAYER, _PARAMS, _EXTEND, _ROWS, c_int64],
    "sf_decode_row": [_LAYER, _PARAMS, _DECODE, _ROWS, c_int64],
    "sf_commit": [_LAYER, _PARAMS, _PLAN(structs.CommitPlanStruct), c_int64],
    "sf_verify": [_LAYER, _PARAMS, _VERIFY, _ROWS, _DRAFTS, c_int64],
    "sf_accept": [_LAYER, _PARAMS, _ACCEPT, _DRAFTS, c_int64],
    "sf_state_steps": [_PACKED, _PARAMS, _ROWS, c_int64],
    "sf_conv_extend": [_LAYER, _CONV, _EXTEND, _COLUMNS, c_int64],
    "sf_conv_row": [_LAYER, _CONV, _DECODE, _COLUMNS, c_int64],
    "sf_conv_verify": [_LAYER, _CONV, _VERIFY, _COLUMNS, _DRAFTS, c_int64],
    "sf_norm": [_PACKED, c_int64],
    "sf_add_norm": [_PACKED, c_int64],
    "sf_linear": [_PACKED, c_int64],
    "sf_activation": [_PACKED, c_int64],
    "sf_rotary": [_PACKED, c_int64],
    "sf_cast": [_PACKED, c_int64],
    "sf_attention": [_KV_LAYER, _KV_PLAN, _ROWS, c_int64],
    "sf_replay": [_PACKED, c_int64, c_int64],
    "sf_elementwise": [c_void_p, c_int64, c_int64, c_void_p],
}


_RESULTS = {name: c_int64 for name in ("sf_abi", "sf_state_steps", "sf_rotary", "sf_replay")}


class NativeUnavailable(RuntimeError):
    """No build of the library can run here; the message says why."""


def library_path(directory: Path, variant: Variant) -> Path:
    """Where a build of the variant lies."""
    return directory / f"libstateferry_{variant.name}.so"


class Native:
    """The loaded library. Calls release Python's lock."""

    def __init__(self, variant: Variant, path: Path) -> None:
        self.variant = variant
        self.functions: dict[str, Any] = {}
        library = ctypes.CDLL(str(path))
        for name, arguments in _SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes = arguments
            function.restype = _RESULTS.get(name)
            self.functions[name.removeprefix("sf_")] = function
            setattr(self, name.removeprefix("sf_"), function)
        if self.abi() != ABI:
            raise OSError(f"it was built from older source (ABI {self.abi()}, expected {ABI})")

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"the library has no function {name!r}")


_directory = Path(__file__).parent


def use_directory(directory: Path) -> None:
    """Load builds from somewhere else, for example those made with a sanitizer."""
    global _directory
    _directory = directory
    native.cache_clear()


@functools.cache
def native() -> Native:
    """The best build that this processor runs. Raises NativeUnavailable."""
    machine, features = platform.machine(), processor_features()
    fitting = [v for v in VARIANTS if v.machine == machine and v.flags <= features]
    if not fitting:
        raise NativeUnavailable(f"there is no build for this processor ({machine})")
    built = [v for v in fitting if library_path(_directory, v).exists()]
    if not built:
        raise NativeUnavailable(
            "the library was not built: `pip install` found no C++20 compiler, or it failed"
        )
    path = library_path(_directory, built[0])
    try:
        return Native(built[0], path)
    except (OSError, AttributeError) as error:
        raise NativeUnavailable(f"{path.name} cannot be loaded: {error}") from error


@functools.cache
def processor_features() -> frozenset[str]:
    """Feature names as the kernel lists them; none where it does not say."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return frozenset()
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()
