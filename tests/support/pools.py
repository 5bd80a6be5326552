"""Waiting until every worker's pools are whole again."""

from __future__ import annotations

import asyncio
import time

from stateferry.client import Client


async def wait_until_idle(client: Client, within_s: float) -> float:
    """Seconds until no worker holds anything. Fails the test when that takes too long.

    The figures are the workers' own, so only a report that was made after this call counts: the
    second one to arrive from now on. That alone takes up to two heartbeats, of 0.5 s each.
    """
    began_s = time.monotonic()
    known = {w.description.worker_id: w.load.sequence for w in await client.list_workers()}
    while True:
        workers = await client.list_workers()
        busy = [
            f"{w.description.worker_id}: no fresh report"
            for w in workers
            if w.load.sequence < known.get(w.description.worker_id, 0) + 2
        ]
        busy += [
            f"{w.description.worker_id}: {w.load}"
            for w in workers
            if w.dispatched_requests
            or w.load.active_requests
            or w.load.queued_requests
            or w.load.state_slots_free != w.load.state_slots_total
            or w.load.tail_pages_free != w.load.tail_pages_total
            or w.load.kv_pages_free != w.load.kv_pages_total
        ]
        took_s = time.monotonic() - began_s
        if workers and not busy:
            return took_s
        assert took_s < within_s, f"still held after {took_s:.2f} s: {busy}"
        await asyncio.sleep(0.05)
