"""One log line per event, for people and for grep::

    2026-11-23T19:42:01.123Z INFO  decode-0 decode.loop: sealed request_id=req-1f size_bytes=65536

Fields are passed with ``log.info("sealed", extra=fields(request_id=..., size_bytes=...))``.
Request ids are logged; prompts and generated text never are.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from contextvars import ContextVar
from typing import Any, TextIO

from stateferry.core.errors import ConfigError

_LEVELS = ("debug", "info", "warning", "error")
_FIELDS = "stateferry_fields"
_PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._:-/@+%")


_request_id: ContextVar[str] = ContextVar("request_id", default="")


def log_request_id(request_id: str) -> None:
    """Name this request in every line that the running task logs from now on."""
    _request_id.set(request_id)


def fields(**values: object) -> dict[str, Any]:
    """The ``extra`` of a log call: values that appear as key=value."""
    return {_FIELDS: values}


class LineFormatter(logging.Formatter):
    """Formats one record as one line, whatever its message or traceback holds.

    ``who`` is the role or worker id that every line names.
    """

    def __init__(self, who: str) -> None:
        super().__init__()
        self._who = who

    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        source = record.name.removeprefix("stateferry.")
        line = (
            f"{stamp}.{int(record.msecs):03d}Z {record.levelname:<5} {self._who} {source}: "
            f"{record.getMessage()}"
        )
        values: dict[str, object] = {}
        if request_id := _request_id.get():
            values["request_id"] = request_id
        values |= getattr(record, _FIELDS, {})
        if record.exc_info and record.exc_info[0] is not None:
            values["traceback"] = self.formatException(record.exc_info)
        for key, value in values.items():
            line += f" {key}={_quoted(value)}"
        return line.replace("\r", "\\r").replace("\n", "\\n")


def configure_logging(level: str, who: str, stream: TextIO | None = None) -> None:
    """Send all logs of this process to ``stream`` (standard error) in one form.

    Raises ConfigError naming log.level.
    """
    if level not in _LEVELS:
        raise ConfigError("log.level", f"{level!r} is none of {', '.join(_LEVELS)}")
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(LineFormatter(who))
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(handler)
    # Libraries speak up from warnings on; their chatter is not what log.level is about.
    root.setLevel(max(logging.WARNING, getattr(logging, level.upper())))
    logging.getLogger("stateferry").setLevel(level.upper())


def _quoted(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str(value)
    return text if text and _PLAIN.issuperset(text) else json.dumps(text, ensure_ascii=False)
