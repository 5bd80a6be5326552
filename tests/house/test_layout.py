"""The shape of the tree: import names, sizes, and what must not be in any file."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

FILE_LINES_MAX = {"services": 400, "kernels": 500}
FUNCTION_LINES_MAX = {"services": 70, "kernels": 130}


def test_top_folders_are_not_packages(repository: Path) -> None:
    """``proto`` is proto-plus' import name and ``kernels`` a package of Hugging Face."""
    for folder in ("services", "kernels", "proto", "tests", "docs"):
        assert not (repository / folder / "__init__.py").exists(), folder


def test_our_folders_shadow_nobody(repository: Path) -> None:
    """Run as the Makefile does, from the repository's root, ``proto`` and ``kernels`` are not
    found there, and our two packages come from their source roots."""
    code = (
        "import importlib.util as u, sys\n"
        "for name in ('proto', 'kernels', 'services', 'docs'):\n"
        "    spec = u.find_spec(name)\n"
        "    places = [str(p) for p in (spec.submodule_search_locations or [])] if spec else []\n"
        f"    assert not any(p.startswith({str(repository)!r}) for p in places\n"
        "                   if '/.venv' not in p), (name, places)\n"
        f"assert {str(repository)!r} not in sys.path and '' not in sys.path, sys.path\n"
        "assert u.find_spec('stateferry') and u.find_spec('stateferry_kernels')\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=repository, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_the_repository_is_not_on_the_import_path(repository: Path) -> None:
    assert str(repository) not in sys.path


def test_every_source_folder_is_a_package(repository: Path, sources: list[Path]) -> None:
    roots = {repository / "services", repository / "kernels"}
    for folder in {path.parent for path in sources} - roots:
        assert (folder / "__init__.py").is_file(), folder


def test_files_are_small(repository: Path, sources: list[Path]) -> None:
    found = []
    for path in sources:
        root = path.relative_to(repository).parts[0]
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > FILE_LINES_MAX[root]:
            found.append(f"{path.relative_to(repository)}: {lines} lines")
    assert not found, "\n".join(found)


def test_functions_are_small(repository: Path, sources: list[Path]) -> None:
    found = []
    for path in sources:
        limit = FUNCTION_LINES_MAX[path.relative_to(repository).parts[0]]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                if lines > limit:
                    found.append(f"{path.relative_to(repository)}: {node.name}: {lines} lines")
    assert not found, "\n".join(found)


def test_no_file_names_a_machine_or_leaves_a_note(repository: Path, sources: list[Path]) -> None:
    """No TODO, no shell, no address that listens to the whole world, no path of one machine."""
    forbidden = re.compile(r"\b(TODO|FIXME|XXX)\b|shell=True|0\.0\.0\.0|/home/|/work/|/root/")
    others = [repository / name for name in ("Makefile", "pyproject.toml", ".ci/run")]
    found = [
        f"{path.relative_to(repository)}:{number}: {line.strip()}"
        for path in [*sources, *others]
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if forbidden.search(line)
    ]
    assert not found, "\n".join(found)


def test_constraints_name_every_dependency(repository: Path) -> None:
    """What pyproject.toml asks for is pinned, and torch without a local version."""
    lines = (repository / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert re.fullmatch(r"[\d.]+", pins["torch"])
    pinned = {re.sub(r"[-_.]+", "-", name).lower() for name in pins}
    for requirement in importlib.metadata.requires("stateferry") or []:
        name = re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", requirement)[0]).lower()
        if 'extra == "cu13"' not in requirement:
            assert name in pinned, f"{name} has no pin in constraints.txt"
