"""Commands: what they print, and one friendly line instead of a traceback."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from stateferry import __version__
from stateferry.cli.app import run


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["fly"], 2, "fly"),
        (["serve", "--prefill", "0"], 2, "--prefill"),
        (["serve", "--no-such-flag"], 2, "--no-such-flag"),
        (["generate"], 2, "prompt"),
        (["generate", "x", "--max-tokens", "many"], 2, "--max-tokens"),
        (["generate", "x", "--max-tokens", "99999999999", "--router", "127.0.0.1:1"], 1, "request"),
        (["generate", "x", "--router", "127.0.0.1:1"], 1, "no router answers at 127.0.0.1:1"),
        (["status", "--router", "127.0.0.1:1"], 1, "no router answers at 127.0.0.1:1"),
        (["models", "--router", "127.0.0.1:1"], 1, "no router answers at 127.0.0.1:1"),
        (["config", "--set", "router.prot=1"], 1, "router.prot: no such setting"),
        (["config", "--set", "router.port=x"], 1, "router.port"),
        (["config", "--set", "router.port"], 1, "--set"),
        (["config", "--config", "/nowhere.toml"], 1, "/nowhere.toml"),
        (["demo", "--prompts-file", "/nowhere.txt"], 1, "--prompts-file"),
    ],
)
def test_a_mistake_gets_one_line(
    arguments: list[str], code: int, words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == code
    output, errors = capfd.readouterr()
    lines = errors.splitlines()
    assert output == "" and len(lines) == 1
    assert lines[0].startswith("stateferry: ") and words in lines[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["router", "--set", "model.dir=/nowhere"], "model.dir"),
        (["prefill"], "cluster.routers"),
        (["decode", "--set", "log.level=loud"], "log.level"),
    ],
)
def test_a_process_that_cannot_run_says_why(arguments: list[str], words: str) -> None:
    command = [sys.executable, "-P", "-m", "stateferry", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("stateferry: ") and words in line


def test_version(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["version"]) == 0
    assert capfd.readouterr().out == f"{__version__}\n"


def test_config_merges_its_sources_and_masks(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "s.toml"
    file.write_text("[router]\nport = 1\n[cluster]\nkey = 'a secret of ours'\n")
    monkeypatch.setenv("STATEFERRY_WORKER_THREADS", "3")
    assert run(["config", "--config", str(file), "--set", "router.host=::1"]) == 0
    output = capfd.readouterr().out
    for line in ("port = 1", 'host = "::1"', "threads = 3", 'key = "***"'):
        assert line in output.splitlines()
    assert "a secret of ours" not in output


def test_python_m_works(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "stateferry", "version"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"{__version__}\n")


def test_a_reader_that_leaves_is_no_error(tmp_path: Path) -> None:
    """As `stateferry config | head -1`."""
    read = "import sys; sys.stdin.readline()"
    command = [sys.executable, "-m", "stateferry", "config", "--markdown"]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as writer,
        subprocess.Popen([sys.executable, "-c", read], stdin=writer.stdout),
    ):
        assert writer.stdout is not None and writer.stderr is not None
        writer.stdout.close()
        assert writer.stderr.read() == b""
