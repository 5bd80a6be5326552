"""Builds of the library: which one is loaded, what is said when none can be, and that all give the
same bits."""

from __future__ import annotations

import json
import logging
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from stateferry_kernels.dispatch import BackendUnavailable, select_kernels
from stateferry_kernels.native import build, library
from support.backends import native_or_skip

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "tests/support/native_digest.py"
V3 = next(v for v in library.VARIANTS if v.name == "x86_64_v3")


@pytest.fixture
def builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty directory of builds, on an x86-64 machine."""
    before = library._directory
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    library.use_directory(tmp_path)
    yield tmp_path
    library.use_directory(before)


def pretend(monkeypatch: pytest.MonkeyPatch, features: frozenset[str]) -> list[str]:
    """This processor has these features, and loading only notes which build it was."""
    loaded: list[str] = []

    class Noted:
        def __init__(self, variant: library.Variant, path: Path) -> None:
            self.variant = variant
            loaded.append(path.name)

    monkeypatch.setattr(library, "processor_features", lambda: features)
    monkeypatch.setattr(library, "Native", Noted)
    return loaded


def flags_of(name: str) -> frozenset[str]:
    return next(v.flags for v in library.VARIANTS if v.name == name)


@pytest.mark.skipif(platform.machine() not in build.FLAGS, reason="no variant for this machine")
def test_the_library_is_there_where_a_compiler_is() -> None:
    """Without it half of the kernel tests would skip, and nobody would look."""
    try:
        build.compiler()
    except build.BuildFailed as error:
        pytest.skip(f"the library cannot have been built: {error}")
    variants = [v for v in library.VARIANTS if v.machine == platform.machine()]
    if not any(v.flags <= library.processor_features() for v in variants):
        pytest.skip("no build of the library runs on this processor")
    assert library.native().variant in variants


@pytest.mark.parametrize("name", ["x86_64_v3", "x86_64_v4", "x86_64_v4_bf16"])
def test_the_best_build_for_the_processor(
    builds: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for variant in library.VARIANTS:
        library.library_path(builds, variant).touch()
    loaded = pretend(monkeypatch, flags_of(name) | {"sse2"})
    assert library.native().variant.name == name
    assert loaded == [f"libstateferry_{name}.so"]


def test_a_build_that_is_missing_is_passed_over(
    builds: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library.library_path(builds, V3).touch()
    pretend(monkeypatch, flags_of("x86_64_v4_bf16"))
    assert library.native().variant.name == "x86_64_v3"


def test_one_feature_short_is_too_few(builds: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variant in library.VARIANTS:
        library.library_path(builds, variant).touch()
    for missing in V3.flags:
        pretend(monkeypatch, V3.flags - {missing})
        with pytest.raises(library.NativeUnavailable, match="no build for this processor"):
            library.native()


def test_nothing_built(builds: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, V3.flags)
    with pytest.raises(library.NativeUnavailable, match="was not built"):
        library.native()
    with pytest.raises(BackendUnavailable, match=r"cpu backend cannot run.*was not built"):
        select_kernels("cpu")


def test_serving_falls_back_with_a_warning(
    builds: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pretend(monkeypatch, V3.flags)
    with caplog.at_level(logging.WARNING):
        assert select_kernels().name == "torch"
    assert "slower" in caplog.text and "was not built" in caplog.text


def test_a_file_that_is_no_library(builds: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library.library_path(builds, V3).write_text("not a library")
    monkeypatch.setattr(library, "processor_features", lambda: V3.flags)
    with pytest.raises(library.NativeUnavailable, match=r"libstateferry_x86_64_v3\.so cannot be"):
        library.native()


def test_a_build_of_older_source(builds: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an editable install whose source went on: it lacks a function, and has to say so."""
    if not shutil.which("cc"):
        pytest.skip("no C compiler")
    target = library.library_path(builds, V3)
    command = ["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(target)]
    subprocess.run(command, input="void sf_chunk_scan(void) {}", text=True, check=True)
    monkeypatch.setattr(library, "processor_features", lambda: V3.flags)
    with pytest.raises(library.NativeUnavailable):
        library.native()


def test_an_unknown_variant_is_not_built(tmp_path: Path) -> None:
    with pytest.raises(build.BuildFailed, match="no variant z80"):
        build.build(tmp_path, only="z80")
    assert list(tmp_path.iterdir()) == []


def test_every_variant_has_flags() -> None:
    for machine, flags in build.FLAGS.items():
        assert set(flags) == {v.name for v in library.VARIANTS if v.machine == machine}


def digests(directory: Path, variant: library.Variant) -> dict[str, str]:
    paths = [str(ROOT / name) for name in ("kernels", "tests")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-P", str(PROGRAM), str(directory), variant.name]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout)
    assert len(found) > 20
    return found


@pytest.mark.parametrize("name", [v.name for v in library.VARIANTS])
def test_every_build_that_runs_here_gives_the_same_bits(name: str) -> None:
    """As the loaded one, where they promise equal bits."""
    loaded = native_or_skip().variant
    other = next(v for v in library.VARIANTS if v.name == name)
    if other.machine != loaded.machine or not other.flags <= library.processor_features():
        pytest.skip(f"{name} cannot run on this processor")
    if not library.library_path(library._directory, other).exists():
        pytest.skip(f"{name} was not built")
    ours, theirs = digests(library._directory, loaded), digests(library._directory, other)
    differing = {case for case in ours if ours[case] != theirs[case]}
    if loaded.numerics == other.numerics:
        assert differing == set()
    else:
        # The processor rounds pairs of bf16 products itself: projections alone may differ, and do
        # where that survives the rounding of their outputs.
        assert all(case.startswith("linear") for case in differing)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_plain_cpp_gives_the_same_bits(tmp_path: Path) -> None:
    loaded = native_or_skip().variant
    # Whose projections are sums of another order (see numerics) has no plain form.
    plain = [v for v in library.VARIANTS if v.numerics != library.VARIANTS[0].numerics]
    variants = [v for v in plain if v.flags <= loaded.flags]
    chosen = next(v for v in variants if v.machine == loaded.machine)
    build.build(tmp_path, portable=True, only=chosen.name)
    assert digests(tmp_path, chosen) == digests(library._directory, chosen)


def test_what_is_newer_than_its_sources_is_left_alone(tmp_path: Path) -> None:
    variant = next(iter(build.FLAGS[platform.machine()]))
    built = tmp_path / f"libstateferry_{variant}.so"
    built.write_bytes(b"as it was")
    assert build.build(tmp_path, only=variant, stale_only=True) == [built]
    assert built.read_bytes() == b"as it was"
