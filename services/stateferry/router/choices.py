"""Runs the n continuations of one request: as many attempts, of different seeds, at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from stateferry.api.answer_codec import Completion
from stateferry.router.client_stream import Emit
from stateferry.router.generate import Generation, Job
from stateferry.router.task_errors import root_cause

Finish = Callable[[Completion], Awaitable[None]]


async def run_choices(
    generation: Generation, job: Job, num_choices: int, emit: Emit, finish: Finish
) -> None:
    """``finish`` gets one completion per choice, as they end. Raises StateferryError: when one
    choice fails, the others are cancelled."""

    async def run(choice: int) -> None:
        await finish(await generation.run(job.of_choice(choice), emit))

    if num_choices == 1:
        await run(0)
        return
    try:
        async with asyncio.TaskGroup() as group:
            for choice in range(num_choices):
                group.create_task(run(choice))
    except BaseExceptionGroup as errors:
        raise root_cause(errors) from None
