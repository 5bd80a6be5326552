"""Who may import whom. What a row does not name is forbidden; imports in functions count too."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

KERNELS = "stateferry_kernels"

# Component -> components of ours, third parties. The standard library is free for all but the
# scheduler. A component is a package or module directly below services/stateferry.
ALLOWED: dict[str, tuple[str, str]] = {
    "core": ("", ""),
    "config": ("core config_sources", ""),
    "config_sources": ("core", ""),
    "prefix": ("core", ""),
    "v1": ("", "grpc google"),
    "bundled": ("core", ""),
    # How the bundled model was made; serving never runs it.
    "bundled.recipe": (
        f"bundled core models {KERNELS}",
        "torch numpy safetensors tokenizers",
    ),
    "models": (f"core {KERNELS}", "torch safetensors numpy"),
    "cache": (f"core prefix {KERNELS}", "torch"),
    # llguidance brings neither torch nor a model: routers check guides with it.
    "guided": ("core", "llguidance numpy"),
    # Guesses in plain Python; a model that drafts is the engine's.
    "drafting": ("core", ""),
    "engine": (f"core cache models guided drafting {KERNELS}", "torch numpy"),
    "scheduler": ("core prefix", ""),
    "transfer": ("core", "torch numpy google_crc32c"),
    "api": ("core v1", "grpc grpc_health grpc_reflection google"),
    "telemetry": ("core", "prometheus_client"),
    "router": ("core config prefix api telemetry v1 guided", "grpc grpc_health google tokenizers"),
    # The router's other door; it knows the router, not the other way round.
    "http_front": (
        "core config api telemetry v1 router",
        "grpc starlette uvicorn jinja2",
    ),
    # What prefill and decode share.
    "worker": (
        "core config prefix api telemetry v1 models cache drafting engine guided scheduler "
        f"transfer {KERNELS}",
        "grpc torch",
    ),
    "prefill": (
        f"core config api telemetry v1 cache engine scheduler transfer worker {KERNELS}",
        "grpc torch",
    ),
    "decode": (
        f"core config api telemetry v1 cache drafting engine scheduler transfer worker {KERNELS}",
        "grpc torch",
    ),
    # The one-process engine.
    "colocated": (f"core cache drafting engine models scheduler worker {KERNELS}", "torch"),
    # For users and for the modules below.
    "client": ("core api v1", "grpc"),
    "config_docs": ("config", ""),
    # Roots: nobody above imports them.
    "local": ("core config v1", "grpc rich"),
    "demo": ("core config client local v1", "grpc rich"),
    "cli": ("core config config_docs client local demo wiring v1", "grpc google rich typer"),
    "wiring": (
        "core config bundled drafting http_front router worker prefill decode telemetry transfer "
        "models api",
        "uvloop",
    ),
    "__main__": ("cli", ""),
    # Only the version.
    "__init__": ("", ""),
    KERNELS: ("", "torch triton numpy"),
}

# Module -> third party that only this module may import.
EXCLUSIVE = {
    "transfer/ucx.py": "ucxx",
    "ray_app.py": "ray",
    "models/hub.py": "huggingface_hub",
}

# The scheduler decides: it neither waits nor looks at a clock or another machine.
SCHEDULER_FORBIDDEN = {"asyncio", "time", "datetime", "socket", "threading", "os", "random"}

# Modules that may use os.environ for anything but setdefault: the loader, and the supervisor,
# which hands its own environment on.
ENVIRONMENT_READERS = {"config_sources.py", "local/environment.py"}

TORCH_FREE = (
    "core",
    "config",
    "config_sources",
    "prefix",
    "scheduler",
    "router",
    "http_front",
    "telemetry",
    "client",
    "cli",
    "local",
)


def component_of(path: Path, repository: Path) -> str:
    kernels = repository / "kernels" / KERNELS
    if kernels in path.parents:
        return KERNELS
    parts = path.relative_to(repository / "services/stateferry").parts
    return "bundled.recipe" if parts[:2] == ("bundled", "recipe") else parts[0].removesuffix(".py")


def imported_modules(source: str) -> Iterator[str]:
    """Dotted names; a relative import would hide its target, so it counts as one named '.'."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level:
            yield "."
        elif isinstance(node, ast.ImportFrom) and node.module == "stateferry":
            yield from (f"stateferry.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def find_violations(component: str, module: str, source: str) -> list[str]:
    """Imports that ``module`` (a path below its root) of ``component`` must not have."""
    ours, theirs = (set(names.split()) for names in ALLOWED[component])
    if exclusive := EXCLUSIVE.get(module):
        theirs.add(exclusive)
    found = []
    for name in imported_modules(source):
        top, _, rest = name.partition(".")
        if top == "stateferry":
            target = (
                "bundled.recipe"
                if f"{rest}.".startswith("bundled.recipe.")
                else (rest.partition(".")[0])
            )
            fine = target in {component, "", "__version__"} | ours and component != KERNELS
        elif top == KERNELS:
            fine = component == KERNELS or KERNELS in ours
        elif top in sys.stdlib_module_names:
            fine = component != "scheduler" or top not in SCHEDULER_FORBIDDEN
        else:
            fine = top in theirs
        if not fine:
            found.append(f"{component}: {module} imports {name}")
    return found


def test_imports_follow_the_table(repository: Path, sources: list[Path]) -> None:
    found = []
    for path in sources:
        component = component_of(path, repository)
        assert component in ALLOWED, f"{component} needs a row in the table of contracts"
        root = repository / "kernels" if component == KERNELS else repository / "services"
        module = path.relative_to(root).as_posix().removeprefix("stateferry/")
        found += find_violations(component, module, path.read_text(encoding="utf-8"))
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("component", "module", "source"),
    [
        ("router", "router/main.py", "import torch"),
        ("router", "router/main.py", "def f():\n    import stateferry.engine.runner"),
        ("prefill", "prefill/main.py", "from stateferry.decode.loop import DecodeLoop"),
        ("prefill", "prefill/main.py", "from stateferry import decode"),
        ("decode", "decode/main.py", "from stateferry.prefill import loop"),
        ("transfer", "transfer/sender.py", "import ucxx"),
        ("scheduler", "scheduler/decode.py", "from time import monotonic"),
        ("scheduler", "scheduler/decode.py", "import torch"),
        ("prefix", "prefix/radix_tree.py", "import numpy"),
        ("prefix", "prefix/radix_tree.py", "from stateferry.cache.slots import SlotPool"),
        ("core", "core/ids.py", "from stateferry.config import Config"),
        ("worker", "worker/host.py", "from stateferry.wiring import run_process"),
        ("worker", "worker/host.py", "from . import wiring"),
        ("wiring", "wiring.py", "from stateferry.bundled.recipe import corpus"),
        ("client", "client.py", "from stateferry.cli import main"),
        (KERNELS, f"{KERNELS}/ssd/scan.py", "import stateferry"),
    ],
)
def test_a_forbidden_import_is_found(component: str, module: str, source: str) -> None:
    assert find_violations(component, module, source)


def test_only_the_ucx_module_may_import_ucxx() -> None:
    assert not find_violations("transfer", "transfer/ucx.py", "import ucxx")


def environment_uses(source: str) -> list[int]:
    """Lines that use os.environ or os.getenv for anything but ``os.environ.setdefault``."""
    tree = ast.parse(source)
    writes = {
        id(node.func.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "setdefault"
    }
    names = {"environ", "environb", "getenv", "getenvb", "putenv"}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in names and id(node) not in writes:
            found.append(node.lineno)
        elif isinstance(node, ast.ImportFrom) and node.module == "os":
            found += [node.lineno for alias in node.names if alias.name in names]
    return found


def test_only_the_loader_reads_the_environment(repository: Path, sources: list[Path]) -> None:
    found = []
    for path in sources:
        if repository / "services" in path.parents:
            module = path.relative_to(repository / "services/stateferry").as_posix()
            if module in ENVIRONMENT_READERS:
                continue
        uses = environment_uses(path.read_text(encoding="utf-8"))
        found += [f"{path.relative_to(repository)}:{line}" for line in uses]
    assert not found, "settings come from config_sources.py: " + ", ".join(found)


def test_a_read_of_the_environment_is_found() -> None:
    assert environment_uses("import os\nos.environ['X']")
    assert environment_uses("import os\nos.getenv('X')")
    assert environment_uses("from os import environ")
    assert not environment_uses("import os\nos.environ.setdefault('X', 'y')")


def test_a_router_process_never_loads_torch(repository: Path, sources: list[Path]) -> None:
    """The table forbids it directly; this also sees what arrives through somebody else."""
    modules = []
    for path in sources:
        component = component_of(path, repository)
        if component in TORCH_FREE:
            relative = path.relative_to(repository / "services").with_suffix("")
            modules.append(".".join(relative.parts).removesuffix(".__init__"))
    modules += ["stateferry.wiring"]
    code = "import importlib, sys\n"
    code += f"for name in {modules!r}: importlib.import_module(name)\n"
    code += "sys.exit('torch was loaded' if 'torch' in sys.modules else 0)"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
