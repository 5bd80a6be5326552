"""Calls to a router, and what their failures look like."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import grpc

from stateferry.client import describe_error
from stateferry.core.errors import InvalidRequest, StateferryError, Unavailable

PLAIN_TIMEOUT_S = 10.0


def run_call(work: Coroutine[Any, Any, None], address: str) -> None:
    """Run ``work``; failures become errors of ours that name ``address``."""
    try:
        asyncio.run(work)
    except grpc.aio.AioRpcError as error:
        raise StateferryError(describe_error(error, address)) from error
    except TimeoutError as error:
        raise Unavailable(f"no answer from {address} in {PLAIN_TIMEOUT_S:.0f} s") from error
    except ValueError as error:
        # Values that do not fit a field are refused before anything is sent.
        raise InvalidRequest("request", str(error)) from error
