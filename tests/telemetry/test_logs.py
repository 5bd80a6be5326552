"""One line per event, with its fields."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Iterator

import pytest

from stateferry.core.errors import ConfigError
from stateferry.telemetry.logs import configure_logging, fields


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    root, ours = logging.getLogger(), logging.getLogger("stateferry")
    kept, levels = root.handlers[:], (root.level, ours.level)
    written = io.StringIO()
    configure_logging("info", "decode-0", written)
    yield written
    root.handlers[:] = kept
    root.setLevel(levels[0])
    ours.setLevel(levels[1])


def test_a_line_holds_time_level_worker_event_and_fields(stream: io.StringIO) -> None:
    extra = fields(request_id="req-1", size_bytes=10, took_s=0.25, why="two words", empty="")
    logging.getLogger("stateferry.decode.loop").info("sealed %s", "it", extra=extra)
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z INFO  decode-0 decode\.loop: sealed it "
        r'request_id=req-1 size_bytes=10 took_s=0\.25 why="two words" empty=""\n',
        stream.getvalue(),
    )


def test_nothing_breaks_the_line(stream: io.StringIO) -> None:
    log = logging.getLogger("stateferry.x")
    log.info("a\nb", extra=fields(name="c\nd"))
    try:
        raise ValueError("line one\nline two")
    except ValueError:
        log.exception("failed")
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2
    assert "ValueError" in lines[1] and "line two" in lines[1]


def test_levels(stream: io.StringIO) -> None:
    logging.getLogger("stateferry.x").debug("hidden")
    logging.getLogger("grpc").info("chatter")
    assert stream.getvalue() == ""
    logging.getLogger("grpc").warning("trouble")
    assert "WARNING decode-0 grpc: trouble" in stream.getvalue()


def test_a_wrong_level_names_the_setting() -> None:
    with pytest.raises(ConfigError, match=r"log\.level"):
        configure_logging("loud", "router")
