"""What the setting model.dir may name."""

from __future__ import annotations

from pathlib import Path

import pytest

from stateferry import wiring
from stateferry.config import ModelSection
from stateferry.core.errors import ConfigError, ModelError


def test_a_hub_id_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}")
    asked = []

    def fetch(hub_id: str) -> Path:
        asked.append(hub_id)
        return tmp_path

    monkeypatch.setattr(wiring, "hub_directory", fetch)
    assert wiring.model_directory(ModelSection(dir="owner/model@main")) == tmp_path.resolve()
    assert asked == ["owner/model@main"]


def test_a_directory_is_not_taken_for_a_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "owner/model").mkdir(parents=True)
    (tmp_path / "owner/model/config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    expected = (tmp_path / "owner/model").resolve()
    assert wiring.model_directory(ModelSection(dir="owner/model")) == expected


def test_a_hub_that_has_it_not_is_a_setting_at_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(hub_id: str) -> Path:
        raise ModelError(f"{hub_id}: no such model")

    monkeypatch.setattr(wiring, "hub_directory", fetch)
    with pytest.raises(ConfigError, match=r"model\.dir.*owner/none"):
        wiring.model_directory(ModelSection(dir="owner/none"))
