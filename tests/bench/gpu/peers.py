"""Other projects' Triton kernels, imported from files that somebody unpacked; none is ours.

A folder holds parts of their packages at the places that they have in them:

    mamba_ssm/ops/triton/*.py  mamba_ssm/utils/{determinism,torch}.py      of mamba_ssm's sdist
    vllm/model_executor/layers/mamba/ops/*.py and configs/                 of a vLLM wheel
    sglang/kernels/ops/mamba/triton_ops/*.py                               of SGLang's wheel

Their packages' own ``__init__`` are not run: they would want compiled extensions and servers. What
the kernels import from elsewhere in their projects is a few helpers, which are stubs here.
"""

from __future__ import annotations

import importlib
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl

_VLLM = "vllm.model_executor.layers.mamba.ops"
_SGLANG = "sglang.kernels.ops.mamba.triton_ops"
_MAMBA = "mamba_ssm.ops.triton"


@dataclass(frozen=True)
class Peers:
    """Modules by name, for example ``vllm.ssd_combined``; what is not there is not in it, and
    ``missing`` says why."""

    modules: dict[str, types.ModuleType]
    missing: dict[str, str]

    def function(self, name: str) -> Any | None:
        """``vllm.ssd_combined.mamba_chunk_scan_combined_varlen``, or None."""
        module, _, attribute = name.rpartition(".")
        return getattr(self.modules.get(module), attribute, None)


def load(folder: Path | None) -> Peers:
    """The peers' modules in the folder; none without one."""
    wanted = {
        "mamba_ssm.ssd_combined": f"{_MAMBA}.ssd_combined",
        "mamba_ssm.selective_state_update": f"{_MAMBA}.selective_state_update",
        "vllm.ssd_combined": f"{_VLLM}.ssd_combined",
        "vllm.mamba_ssm": f"{_VLLM}.mamba_ssm",
        "sglang.ssd_combined": f"{_SGLANG}.ssd_combined",
        "sglang.mamba_ssm": f"{_SGLANG}.mamba_ssm",
    }
    modules: dict[str, types.ModuleType] = {}
    missing: dict[str, str] = {}
    if folder is None:
        return Peers(modules, dict.fromkeys(wanted, "no folder of peers given"))
    for package in (_VLLM, _SGLANG, _MAMBA, "mamba_ssm.utils"):
        _bare_packages(folder, package)
    for name, attributes in _stubs().items():
        _stub(name, attributes)
    for name, module in wanted.items():
        try:
            modules[name] = importlib.import_module(module)
        except Exception as error:
            missing[name] = f"{type(error).__name__}: {error}"
    return Peers(modules, missing)


def _bare_packages(folder: Path, package: str) -> None:
    """Packages that are only their folders."""
    parts = package.split(".")
    for depth in range(1, len(parts) + 1):
        name = ".".join(parts[:depth])
        module = sys.modules.setdefault(name, types.ModuleType(name))
        module.__path__ = [str(folder.joinpath(*parts[:depth]))]


def _stub(name: str, attributes: dict[str, Any]) -> None:
    parent, _, last = name.rpartition(".")
    if parent and parent not in sys.modules:
        _stub(parent, {})
    module = sys.modules.setdefault(name, types.ModuleType(name))
    if not hasattr(module, "__path__"):
        module.__path__ = []
    for attribute, value in attributes.items():
        setattr(module, attribute, value)
    if parent:
        setattr(sys.modules[parent], last, module)


class _Platform:
    """This GPU, as vLLM asks for it."""

    def is_cuda(self) -> bool:
        return True

    def is_cpu(self) -> bool:
        return False

    def is_xpu(self) -> bool:
        return False

    def is_rocm(self) -> bool:
        return False

    def is_device_capability(self, capability: int) -> bool:
        return _capability() == capability


def _capability() -> int:
    major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
    return 10 * major + minor


def _device_file_name() -> str:
    return torch.cuda.get_device_name().replace(" ", "_")


def _logger(name: str) -> Any:
    """Says nothing."""
    names = ("debug", "info", "warning", "error", "info_once", "warning_once")
    return types.SimpleNamespace(**dict.fromkeys(names, lambda *message, **options: None))


def _stubs() -> dict[str, dict[str, Any]]:
    return {
        "vllm.triton_utils": {"triton": triton, "tl": tl, "HAS_TRITON": True},
        "vllm.envs": {"VLLM_TUNED_CONFIG_FOLDER": None},
        "vllm._custom_ops": {},
        "vllm.logger": {"init_logger": _logger},
        "vllm.platforms": {"current_platform": _Platform()},
        "vllm.utils.platform_utils": {"get_device_name_as_file_name": _device_file_name},
        # The state that its padding rows read.
        "vllm.v1.attention.backends.utils": {"NULL_BLOCK_ID": 0},
        "sglang.kernels.ops.attention.fla.utils": {"autotune_cache_kwargs": {}},
        "sglang.kernels.jit.utils": {"is_arch_support_pdl": lambda: _capability() >= 90},
    }
