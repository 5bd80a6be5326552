"""Our errors as OpenAI's: a status, a body and headers; the one place where HTTP codes are chosen.

Fields keep the names that they have in JSON, also where a check knows them by their proto path.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

from stateferry.core import errors

_KINDS: tuple[tuple[type[errors.StateferryError], int, str], ...] = (
    (errors.InvalidRequest, 400, "invalid_request_error"),
    (errors.GuideBroke, 400, "invalid_request_error"),
    (errors.DeadlineExceeded, 408, "timeout_error"),
    (errors.Overloaded, 429, "rate_limit_error"),
    (errors.Unavailable, 503, "service_unavailable_error"),
    # Workers that refuse or mistrust each other; another attempt meets others.
    (errors.Refused, 503, "service_unavailable_error"),
    (errors.HandoffError, 503, "service_unavailable_error"),
)
# Clients try again by themselves after 503, 429 and 408.
_UNAVAILABLE_RETRY_S = 1
_PATHS = {
    "stop.strings": "stop",
    "stop.token_ids": "stop_token_ids",
    "stop.include_stop": "include_stop_str_in_output",
    "guide": "response_format",
    "prompt_logprobs": "logprobs",
    "request_id": "X-Request-Id",
}
_PROMPT_PATHS = ("text", "token_ids", "prompt")


@dataclass(frozen=True, slots=True)
class HttpError:
    """What a client gets instead of an answer."""

    status: int
    kind: str
    message: str
    param: str | None = None
    code: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def body(self) -> dict[str, Any]:
        return {
            "error": {
                "message": self.message,
                "type": self.kind,
                "param": self.param,
                "code": self.code,
            }
        }


def http_error(error: BaseException, prompt_field: str = "prompt") -> HttpError:
    """``prompt_field`` is what the endpoint calls its prompt. Anything unforeseen is a 500 whose
    details stay in our logs."""
    if isinstance(error, errors.InvalidRequest):
        name = json_name(error.field, prompt_field)
        message = name + str(error).removeprefix(error.field)
        if error.field == "model":
            return HttpError(404, "invalid_request_error", message, name, "model_not_found")
        return HttpError(400, "invalid_request_error", message, name)
    for kind, status, name in _KINDS:
        if isinstance(error, kind):
            headers = {}
            if isinstance(error, errors.Overloaded):
                headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
            elif status == 503:
                headers["Retry-After"] = str(_UNAVAILABLE_RETRY_S)
            return HttpError(status, name, str(error), headers=headers)
    return HttpError(500, "server_error", f"internal error: {type(error).__name__}")


def json_name(path: str, prompt_field: str) -> str:
    """A proto path's name in JSON: ``sampling.top_p`` is ``top_p``, ``stop.strings[1]`` is
    ``stop[1]``."""
    for ours in _PROMPT_PATHS:
        if re.fullmatch(rf"{ours}(\.ids)?(\[\d+\])?", path):
            return prompt_field
    for ours, theirs in _PATHS.items():
        if path == ours or path.startswith((f"{ours}.", f"{ours}[")):
            rest = path[len(ours) :]
            return theirs + (rest if rest.startswith("[") else "")
    return path.removeprefix("sampling.").removeprefix("stop.")
