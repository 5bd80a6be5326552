"""Generated files are what their generators write today."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from pathlib import Path

from stateferry.config_docs import markdown


def test_generated_grpc_code_is_current(repository: Path, tmp_path: Path) -> None:
    """`make proto` would change nothing."""
    protos = sorted(p.relative_to(repository) for p in repository.glob("proto/stateferry/v1/*"))
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    command = [sys.executable, "-P", "-m", "grpc_tools.protoc", "-Iproto", *outputs]
    done = subprocess.run(
        [*command, *map(str, protos)], cwd=repository, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    wanted = {path.name: path.read_text() for path in (tmp_path / "stateferry/v1").iterdir()}
    folder = repository / "services/stateferry/v1"
    present = {path.name: path.read_text() for path in folder.glob("*_pb2*.py*")}
    assert sorted(present) == sorted(wanted)
    stale = [name for name in wanted if present[name] != wanted[name]]
    assert not stale, f"run `make proto`: {stale}"


_NEEDS_COMMENT = re.compile(r"\s+(rpc |(optional |repeated )?[\w.]+ \w+ = \d+;)")


def test_every_method_and_field_of_the_api_has_a_comment(repository: Path) -> None:
    bare, seen = [], 0
    for path in sorted(repository.glob("proto/stateferry/v1/*.proto")):
        lines = path.read_text(encoding="utf-8").splitlines()
        for previous, line in itertools.pairwise(lines):
            if _NEEDS_COMMENT.match(line):
                seen += 1
                if not previous.strip().startswith("//"):
                    bare.append(f"{path.name}: {line.strip()}")
    assert not bare, "\n".join(bare)
    assert seen > 100


def test_the_settings_page_is_current(repository: Path) -> None:
    """`make docs` would change nothing."""
    page = (repository / "docs/CONFIG.md").read_text(encoding="utf-8")
    assert page == markdown(), "run `make docs`"
