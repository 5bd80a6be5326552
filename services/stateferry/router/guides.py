"""Checks guides before a request may wait for workers, without holding up the event loop."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

from stateferry.core.guide import Guide
from stateferry.guided.compiler import GuideCompiler


class GuideGate:
    """Compiles as workers will, so that what passes here passes there."""

    def __init__(self, compiler: GuideCompiler) -> None:
        self._compiler = compiler
        # One thread: a hard guide delays other guides, and nobody else.
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="guides")

    async def check(self, guide: Guide | None) -> None:
        """Raises InvalidRequest naming the guide's field when it cannot be used."""
        if guide is not None:
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self._executor, self._compiler.matcher, guide)

    def close(self) -> None:
        """Stop the thread; what it runs comes to its end first."""
        self._executor.shutdown(wait=False, cancel_futures=True)
