"""Hub ids: what counts as one, what is fetched, and what is said when it cannot be."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from stateferry.core.errors import ModelError
from stateferry.models.hub import hub_directory, is_hub_id


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("owner/model-1.0", True),
        ("owner/model@v2", True),
        ("model", False),
        ("./owner/model", False),
        ("/owner/model", False),
        ("~/model", False),
        ("owner/model/file", False),
        ("../model", False),
        ("owner/model@", False),
    ],
)
def test_what_reads_like_a_hub_id(name: str, expected: bool) -> None:
    assert is_hub_id(name) is expected


def test_a_directory_that_exists_is_no_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_hub_id("owner/model")
    (tmp_path / "owner" / "model").mkdir(parents=True)
    assert not is_hub_id("owner/model")


def test_neither_pickles_nor_code_are_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def download(repository: str, **options: Any) -> str:
        asked.update(options, repository=repository)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert hub_directory("owner/model@v2") == tmp_path
    assert (asked["repository"], asked["revision"]) == ("owner/model", "v2")
    files = [
        "config.json",
        "tokenizer.json",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "modeling_custom.py",
        "onnx/config.json",
        "consolidated.safetensors",
    ]
    fetched = huggingface_hub.utils.filter_repo_objects(
        files,
        allow_patterns=asked["allow_patterns"],
        ignore_patterns=asked["ignore_patterns"],
    )
    assert list(fetched) == files[:4]


@pytest.mark.parametrize("error", [OSError("no route"), ValueError("not a name")])
def test_a_hub_that_gives_nothing_is_said(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(ModelError, match=f"owner/model: .*{error}"):
        hub_directory("owner/model")


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ModelError, match=r"owner/model is no directory.*stateferry\[hub\]"):
        hub_directory("owner/model")


def test_it_needs_no_torch() -> None:
    code = "import sys, stateferry.models.hub; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-P", "-c", code], check=True)
