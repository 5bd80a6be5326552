"""Tickets: the router's signed permission for one attempt of one request on two named workers.

Wire form: ``version (1 byte) | HMAC-SHA256 (32 bytes) | JSON body``. The MAC covers version and
body. Workers take peers and sizes from tickets only, never from clients.
"""

from __future__ import annotations

import dataclasses
import json
import secrets
from dataclasses import dataclass, field

from stateferry.core.clock import Clock
from stateferry.core.cluster_key import MAC_BYTES, ClusterKey
from stateferry.core.errors import TicketError
from stateferry.core.ids import Role, WorkerKey

_VERSION = b"\x02"
_PURPOSE = b"ticket" + _VERSION
_TICKET_MAX_BYTES = 4096
CLOCK_SKEW_S = 60.0


@dataclass(frozen=True, slots=True)
class Ticket:
    """One attempt (``epoch``) of one request. ``expires_at_s`` is wall-clock seconds.

    ``decode`` and ``transfer_address`` are None when no token after the first is wanted, so that
    nothing has to be handed off. ``cache_salt`` is GenerationRequest's: it decides what the workers
    may reuse. ``priority``, ``session`` and ``num_output_ids`` are GenerationRequest's too.
    """

    request_id: str
    epoch: int
    tenant: str
    prefill: WorkerKey
    decode: WorkerKey | None
    transfer_address: str | None
    prompt_len: int
    max_tokens: int
    expires_at_s: float
    cache_salt: str = ""
    priority: int = 0
    session: str = ""
    num_output_ids: int = 0
    nonce: str = field(default_factory=lambda: secrets.token_hex(8))

    @property
    def attempt_id(self) -> str:
        """Unlike the request id, never the same twice: what workers key their books by. A client
        may use its id again at once, while a worker still cleans up after the call before."""
        return f"{self.request_id}/{self.nonce}"


class TicketSigner:
    """Signs and opens tickets."""

    def __init__(self, key: ClusterKey) -> None:
        self._key = key

    def sign(self, ticket: Ticket) -> bytes:
        body = json.dumps(dataclasses.asdict(ticket), separators=(",", ":")).encode()
        return _VERSION + self._key.mac(_PURPOSE, body) + body

    def open(self, blob: bytes) -> Ticket:
        """The ticket in ``blob``, its signature checked. Raises TicketError."""
        if not 1 + MAC_BYTES < len(blob) <= _TICKET_MAX_BYTES or blob[:1] != _VERSION:
            raise TicketError("not a ticket of this version")
        mac, body = blob[1 : 1 + MAC_BYTES], blob[1 + MAC_BYTES :]
        if not self._key.is_mac(mac, _PURPOSE, body):
            raise TicketError("the ticket's signature is wrong")
        fields = json.loads(body)
        fields["prefill"] = WorkerKey(**fields["prefill"])
        fields["decode"] = WorkerKey(**fields["decode"]) if fields["decode"] else None
        return Ticket(**fields)


class TicketDesk:
    """A worker's side: admits each ticket once, and only those meant for this life of it."""

    def __init__(self, signer: TicketSigner, role: Role, me: WorkerKey, clock: Clock) -> None:
        self._signer = signer
        self._role = role
        self._me = me
        self._clock = clock
        self._used: dict[str, float] = {}

    def admit(self, blob: bytes) -> Ticket:
        """Open, check and use up a ticket. Raises TicketError."""
        ticket = self._signer.open(blob)
        now_s = self._clock.wall_s()
        mine = ticket.prefill if self._role is Role.PREFILL else ticket.decode
        if mine != self._me:
            raise TicketError(f"the ticket is for {mine}, this is {self._me}")
        if now_s > ticket.expires_at_s + CLOCK_SKEW_S:
            raise TicketError("the ticket has expired")
        self._forget_expired(now_s)
        if ticket.nonce in self._used:
            raise TicketError("the ticket was used before")
        self._used[ticket.nonce] = ticket.expires_at_s + CLOCK_SKEW_S
        return ticket

    def _forget_expired(self, now_s: float) -> None:
        # Tickets live about as long as each other, so the dict is ordered by expiry.
        while self._used:
            nonce, until_s = next(iter(self._used.items()))
            if until_s >= now_s:
                return
            del self._used[nonce]
