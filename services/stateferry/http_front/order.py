"""What the two endpoints ask for, once their bodies are read."""

from __future__ import annotations

from dataclasses import dataclass

from stateferry.core.errors import InvalidRequest
from stateferry.http_front.fields import Fields
from stateferry.v1 import inference_pb2 as pb

# A year; longer is as good as none.
_MAX_TIMEOUT_S = 366 * 86400.0


@dataclass(frozen=True, slots=True)
class Delivery:
    """How the answer is to come. ``timeout_s`` None: no deadline."""

    stream: bool
    include_usage: bool
    timeout_s: float | None


@dataclass(frozen=True, slots=True)
class Order:
    """One request: ``message`` as a gRPC client would have sent it, but for the id."""

    message: pb.GenerateRequest
    delivery: Delivery
    logprobs: bool


def read_delivery(fields: Fields) -> Delivery:
    """Raises InvalidRequest."""
    stream = fields.flag("stream") or False
    include_usage = False
    options = fields.object("stream_options")
    if options is not None:
        if not stream:
            raise InvalidRequest("stream_options", "needs stream")
        include_usage = options.flag("include_usage") or False
        # Padding against onlookers of an encrypted connection, which this is not.
        options.ignore("include_obfuscation")
        options.refuse_others()
    timeout_s = fields.number("timeout_s")
    if timeout_s is not None and not 0.0 < timeout_s <= _MAX_TIMEOUT_S:
        raise InvalidRequest("timeout_s", f"is not in (0, {_MAX_TIMEOUT_S:g}]")
    return Delivery(stream, include_usage, timeout_s)
