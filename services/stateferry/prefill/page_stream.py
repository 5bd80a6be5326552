"""One attempt's hand-off: KV pages while later slices compute, then all the rest."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace

from stateferry.cache.state_cache import StateCache
from stateferry.cache.state_view import StateView
from stateferry.core.errors import InvalidRequest, Overloaded
from stateferry.core.handoff import HandoffMeta
from stateferry.core.ticket import Ticket
from stateferry.prefill.loop import PrefillLoop
from stateferry.transfer.lane import PushOrder
from stateferry.transfer.sender import HandoffSender, PushReceipt
from stateferry.worker.segments import outgoing_segments
from stateferry.worker.waiting import settle

log = logging.getLogger(__name__)


class PageStream:
    """Begun when the prompt is submitted; ``stop`` it before the prompt's memory is given back.

    One part is under way at a time, with all pages that were finished when it began: the slower the
    wire, the larger the parts. A recurrent state is final only after the last slice, so a model
    without attention sends everything then.
    """

    def __init__(
        self, ticket: Ticket, loop: PrefillLoop, cache: StateCache, sender: HandoffSender
    ) -> None:
        if ticket.decode is None or ticket.transfer_address is None:
            raise InvalidRequest("ticket", "names no decode worker")
        self._receiver, self._address = ticket.decode, ticket.transfer_address
        self._ticket = ticket
        self._loop = loop
        self._cache = cache
        self._sender = sender
        self._parts = 0
        self._pages = 0
        self._early_bytes = 0
        self._is_computed = asyncio.Event()
        sender.prepare(self._address, self._receiver)
        pages = cache.pools.kv
        self._early: asyncio.Task[None] | None = None
        if pages.pages_for(ticket.prompt_len) > 1:
            self._early = asyncio.ensure_future(self._push_early(pages.page_tokens))

    async def finish(self, first_token_id: int) -> PushReceipt:
        """Push what has not gone yet, of a prompt that is computed. The receipt counts all bytes,
        and the time from now. Raises as HandoffSender.push does, also for an earlier part."""
        self._is_computed.set()
        if self._early is not None:
            await self._early
        lease = self._cache.lease(self._ticket.attempt_id)
        views = self._cache.pools.sequence_views(lease, self._pages)
        meta = HandoffMeta(lease.position, first_token_id)
        receipt = await self._push(meta.encode(), views, is_last=True)
        return replace(receipt, size_bytes=receipt.size_bytes + self._early_bytes)

    async def stop(self) -> None:
        """Returns once nothing of this reads the prompt's memory any more."""
        if self._early is not None:
            self._early.cancel()
            await settle(self._early)
            if not self._early.cancelled():
                # Take it: ``finish`` has raised it if anybody wants to know.
                self._early.exception()

    async def _push_early(self, page_tokens: int) -> None:
        request_id = self._ticket.attempt_id
        while not self._is_computed.is_set():
            beyond = (self._pages + 1) * page_tokens - 1
            advanced = asyncio.ensure_future(self._loop.advanced(request_id, beyond))
            computed = asyncio.ensure_future(self._is_computed.wait())
            try:
                await asyncio.wait({advanced, computed}, return_when=asyncio.FIRST_COMPLETED)
                if not advanced.done():
                    return
                end = advanced.result() // page_tokens
            finally:
                advanced.cancel()
                computed.cancel()
            lease = self._cache.lease(request_id)
            views = self._cache.pools.kv.page_views(lease, self._pages, end)
            try:
                receipt = await self._push(b"", views, is_last=False)
            except Overloaded as error:
                # It has not landed: it goes with the last part.
                log.info("prefill: no early pages: %s", error)
                return
            self._early_bytes += receipt.size_bytes
            self._pages = end

    async def _push(self, payload: bytes, views: list[StateView], *, is_last: bool) -> PushReceipt:
        ticket = self._ticket
        order = PushOrder(
            request_id=ticket.attempt_id,
            epoch=ticket.epoch,
            payload=payload,
            segments=outgoing_segments(views),
            part=self._parts,
            is_last=is_last,
        )
        receipt = await self._sender.push_part(self._address, self._receiver, order)
        self._parts += 1
        return receipt
