"""Which backend serves: the device's own, the one that was named, or torch with a warning."""

from __future__ import annotations

import pytest

from stateferry_kernels import dispatch
from stateferry_kernels.dispatch import BackendUnavailable, select_kernels
from stateferry_kernels.native.library import NativeUnavailable


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def unavailable() -> None:
        raise NativeUnavailable("the library was not built")

    monkeypatch.setattr(dispatch, "native", unavailable)


def test_a_named_backend_is_what_one_gets() -> None:
    for name in ("torch", "reference"):
        assert select_kernels(name).name == name


@pytest.mark.usefixtures("no_library")
def test_without_the_library_torch_serves_and_the_log_says_why(
    caplog: pytest.LogCaptureFixture,
) -> None:
    kernels = select_kernels(device="cpu")
    assert kernels.name == kernels.numerics == "torch"
    [message] = caplog.messages
    assert "several times slower" in message and "the library was not built" in message


@pytest.mark.usefixtures("no_library")
def test_a_named_backend_that_cannot_run_is_an_error() -> None:
    with pytest.raises(BackendUnavailable, match="the library was not built"):
        select_kernels("cpu")


def test_the_cpu_gets_the_library_where_it_was_built() -> None:
    try:
        expected = select_kernels("cpu")
    except BackendUnavailable as error:
        pytest.skip(str(error))
    chosen = select_kernels(device="cpu")
    assert chosen == expected and chosen.numerics.startswith("cpu")


def test_an_unknown_backend_lists_the_known() -> None:
    with pytest.raises(ValueError, match="cpu, triton, torch, reference"):
        select_kernels("cuda")
