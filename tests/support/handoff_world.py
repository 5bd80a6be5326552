"""Two senders and a receiver in a simulated network, driving the hand-off machines to their worst.

Memory is modelled as blocks with a generation, which grows whenever a block is given back: whoever
touches one of another generation than he was given has touched reused memory. A sender's bytes are
read when they are delivered, not when they are sent: the receiver of a UCX rendezvous reads them.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from dataclasses import dataclass, field

from stateferry.core.errors import FrameError, Overloaded
from stateferry.core.ids import WorkerKey
from stateferry.transfer.protocol.reasons import RejectReason
from stateferry.transfer.protocol.receiving import (
    Attempt,
    AttemptBook,
    ExpectedPush,
    Landing,
    PartHeader,
)
from stateferry.transfer.protocol.sending import Answer, PartOffer, SendPhase

NUM_SENDERS = 2
MESSAGES = 2
RECEIVER_BLOCKS = 3
SENDER_BLOCKS = 2
MOST_PARTS = 3


class Violated(AssertionError):
    """A rule of the protocol was broken; names the seed."""


@dataclass(eq=False)
class Block:
    generation: int = 0
    data: list[object] = field(default_factory=lambda: [None] * MESSAGES)


class Blocks:
    """A staging pool. ``retire`` gives the room back, and the memory to nobody."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.free = [Block() for _ in range(count)]
        self.in_use = 0

    def take(self) -> Block | None:
        if not self.free:
            return None
        self.in_use += 1
        return self.free.pop()

    def give_back(self, block: Block, *, reusable: bool = True) -> None:
        self.in_use -= 1
        if reusable:
            block.generation += 1
        self.free.append(block if reusable else Block())


@dataclass(eq=False)
class Order:
    """A hand-off that a sender is to make, part by part."""

    request_id: str
    epoch: int
    sender: WorkerKey
    receiver: WorkerKey
    num_parts: int
    next_part: int = 0
    given_up: bool = False

    def content(self, part: int, message: int) -> object:
        return (self.request_id, self.epoch, str(self.sender), part, message)


@dataclass(eq=False)
class Offered:
    """A part in flight, at its sender."""

    order: Order
    header: PartHeader
    machine: PartOffer
    block: Block
    generation: int
    num_read: int = 0


@dataclass(eq=False)
class Incoming:
    """A part in flight, at the receiver."""

    attempt: Attempt
    header: PartHeader
    block: Block
    generation: int
    sequence: int
    num_messages: int = 0
    is_wrong: bool = False


@dataclass(frozen=True)
class Push:
    """The control message that offers a part."""

    sequence: int
    header: PartHeader


@dataclass(eq=False)
class Wire:
    """One connection. To the receiver go a Push, or DATA as (Offered, message number)."""

    sender: int
    incarnation: int
    to_receiver: deque[object] = field(default_factory=deque)
    to_sender: deque[tuple[int, Answer]] = field(default_factory=deque)
    sequence: int = 0
    offered: Offered | None = None
    incoming: Incoming | None = None
    # The sender has found it broken, the receiver has not yet.
    is_half: bool = False


@dataclass(eq=False)
class Room:
    """A reservation's lease: what parts were copied into it, and whether it is still held."""

    attempt: Attempt
    order: Order
    parts: list[list[object]] = field(default_factory=list)
    commits: int = 0
    is_held: bool = True


class World:
    """One schedule. ``run`` raises Violated; ``hazards`` counts what was really met."""

    def __init__(self, seed: int, hazards: Counter[str]) -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        self.hazards = hazards
        self.senders = [WorkerKey(f"prefill-{n}", 1) for n in range(NUM_SENDERS)]
        self.sender_blocks = [Blocks(SENDER_BLOCKS) for _ in range(NUM_SENDERS)]
        self.wires: list[Wire | None] = [None] * NUM_SENDERS
        self.orders: list[list[Order]] = [[] for _ in range(NUM_SENDERS)]
        # A transport operation that nobody waits for any more, but which may still write.
        self.late: list[tuple[Blocks, Incoming]] = []
        self.numbers = 0
        self.said: deque[Push] = deque(maxlen=6)
        self.me = WorkerKey("decode-0", 0)
        self.receiver_starts()

    def run(self, steps: int) -> None:
        moves = (
            [self.reserve] * 2
            + [self.offer] * 6
            + [self.deliver_to_receiver] * 12
            + [self.deliver_to_sender] * 10
            + [self.late_write]
        )
        troubles = (self.cancel, self.give_up, self.break_wire, self.break_half)
        troubles += (self.repeat, self.repeat_answer, self.swap, self.flip, self.drop)
        share = self.rng.choice((0.01, 0.05, 0.2))
        for _ in range(steps):
            self.rng.choice(troubles if self.rng.random() < share else moves)()
            if self.rng.random() < share / 20:
                self.rng.choice((self.receiver_starts, self.sender_restarts))()
            self.check()
        self.end()

    # What a reservation is worth.

    def receiver_starts(self) -> None:
        """A new incarnation: everything it knew is gone, its peers' connections break."""
        for number in range(NUM_SENDERS):
            self.lose(number)
        self.late.clear()
        self.me = WorkerKey("decode-0", self.me.incarnation + 1)
        self.book = AttemptBook(self.me, max_open=6)
        self.blocks = Blocks(RECEIVER_BLOCKS)
        self.rooms: dict[tuple[str, int], Room] = {}

    def sender_restarts(self) -> None:
        number = self.rng.randrange(NUM_SENDERS)
        self.lose(number)
        old = self.senders[number]
        self.senders[number] = WorkerKey(old.worker_id, old.incarnation + 1)
        self.sender_blocks[number] = Blocks(SENDER_BLOCKS)
        self.orders[number].clear()

    def reserve(self) -> None:
        number = self.rng.randrange(NUM_SENDERS)
        self.numbers += 1
        again = self.numbers > 3 and self.rng.random() < 0.3
        request = self.numbers - self.rng.randint(1, 2) if again else self.numbers
        epoch = self.numbers
        parts = self.rng.randint(1, MOST_PARTS)
        order = Order(f"r{request}", epoch, self.senders[number], self.me, parts)
        push = ExpectedPush(order.request_id, epoch, order.sender, MESSAGES * parts, parts > 1)
        if self.rng.random() < 0.03:
            # Somebody told the sender of room that nobody asked for.
            self.orders[number].append(order)
            return
        try:
            attempt = self.book.reserve(push)
        except Overloaded:
            self.hazards["reservation refused"] += 1
            return
        self.rooms[push.attempt] = Room(attempt, order)
        self.orders[number].append(order)

    def cancel(self) -> None:
        if self.rooms:
            room = self.rng.choice(list(self.rooms.values()))
            self.book.close(room.attempt)
            room.is_held = False

    # The sender.

    def offer(self) -> None:
        number = self.rng.randrange(NUM_SENDERS)
        wire = self.wires[number]
        if wire is None:
            wire = self.wires[number] = Wire(number, self.me.incarnation)
        if wire.is_half:
            self.lose(number)
            return
        if wire.offered is not None or not self.orders[number]:
            return
        block = self.sender_blocks[number].take()
        if block is None:
            return
        order = self.rng.choice(self.orders[number])
        part = order.next_part
        block.data[:] = [order.content(part, n) for n in range(MESSAGES)]
        header = PartHeader(
            order.request_id,
            order.epoch,
            order.sender,
            order.receiver,
            part,
            part == order.num_parts - 1,
            MESSAGES,
        )
        wire.sequence += 1
        offer = PartOffer(wire.sequence)
        wire.offered = Offered(order, header, offer, block, block.generation)
        push = Push(wire.sequence, header)
        wire.to_receiver.append(push)
        self.said.append(push)

    def give_up(self) -> None:
        orders = self.rng.choice(self.orders)
        if orders:
            order = orders.pop(self.rng.randrange(len(orders)))
            order.given_up = True

    def deliver_to_sender(self) -> None:
        number = self.rng.randrange(NUM_SENDERS)
        wire = self.wires[number]
        if wire is None or wire.is_half or not wire.to_sender:
            return
        offered = wire.offered
        if offered is not None and offered.machine.phase is SendPhase.CREDITED:
            # It reads no answer while its bytes are on their way.
            return
        sequence, answer = wire.to_sender.popleft()
        if offered is None:
            self.hazards["answer to nothing"] += 1
            self.lose(number)
            return
        try:
            phase = offered.machine.answered(sequence, answer)
        except FrameError:
            self.hazards["answer not due"] += 1
            self.lose(number)
            return
        if phase is SendPhase.CREDITED:
            if answer is Answer.CREDIT:
                wire.to_receiver.extend((offered, n) for n in range(MESSAGES))
            return
        if phase in (SendPhase.SEALED, SendPhase.REFUSED):
            wire.offered = None
            self.sender_blocks[number].give_back(offered.block)
            order = offered.order
            if phase is SendPhase.SEALED:
                order.next_part += 1
            is_done = order.next_part == order.num_parts or phase is SendPhase.REFUSED
            if is_done and order in self.orders[number]:
                self.orders[number].remove(order)

    # The receiver.

    def deliver_to_receiver(self) -> None:
        number = self.rng.randrange(NUM_SENDERS)
        wire = self.wires[number]
        if wire is None or not wire.to_receiver:
            return
        message = wire.to_receiver.popleft()
        if isinstance(message, Push):
            if wire.incoming is not None:
                self.hazards["part within a part"] += 1
                self.lose(number)
            else:
                self.take_offer(wire, message)
        elif wire.incoming is None:
            self.hazards["data without credit"] += 1
            self.lose(number)
        else:
            self.take_data(number, wire, message)

    def take_offer(self, wire: Wire, push: Push) -> None:
        sequence, header = push.sequence, push.header
        # The handshake told who is there.
        claimed = self.book.claim(header, self.senders[wire.sender])
        if isinstance(claimed, RejectReason):
            self.hazards[claimed.name] += 1
            wire.to_sender.append((sequence, Answer.REJECT))
            return
        block = self.blocks.take()
        if block is None:
            self.hazards["no staging"] += 1
            self.book.postpone(claimed)
            wire.to_sender.append((sequence, Answer.REJECT))
            return
        wire.incoming = Incoming(claimed, header, block, block.generation, sequence)
        wire.to_sender.append((sequence, Answer.CREDIT))

    def take_data(self, number: int, wire: Wire, message: object) -> None:
        incoming = wire.incoming
        assert incoming is not None
        if isinstance(message, str):
            incoming.block.data[incoming.num_messages] = message
        else:
            assert isinstance(message, tuple)
            offered, which = message
            if offered.block.generation != offered.generation:
                self.fail("the receiver read staging that its sender had reused")
            bytes_read = "flipped" if which < 0 else offered.block.data[which]
            incoming.block.data[incoming.num_messages] = bytes_read
            offered.num_read += 1
            if offered.num_read == MESSAGES and offered is wire.offered:
                offered.machine.sent()
        incoming.num_messages += 1
        if incoming.num_messages == MESSAGES:
            wire.incoming = None
            self.arrived(wire, incoming)

    def arrived(self, wire: Wire, incoming: Incoming) -> None:
        if incoming.block.generation != incoming.generation:
            self.fail("a part lies in staging that was given to somebody else")
        room = self.rooms[incoming.attempt.push.attempt]
        wanted = [room.order.content(incoming.header.number, n) for n in range(MESSAGES)]
        landed = list(incoming.block.data)
        # The checksum of what was offered.
        if landed != wanted:
            self.hazards["wrong bytes"] += 1
            self.book.close(incoming.attempt)
            room.is_held = False
            self.blocks.give_back(incoming.block)
            wire.to_sender.append((incoming.sequence, Answer.FAILED))
            return
        landing = self.book.land(incoming.attempt)
        if landing is Landing.DROP:
            self.hazards["dropped after a cancel"] += 1
        else:
            if not room.is_held:
                self.fail("a part was copied into memory that somebody else holds")
            room.parts.append(landed)
            room.commits += landing is Landing.SEAL
        self.blocks.give_back(incoming.block)
        answer = Answer.FAILED if landing is Landing.DROP else Answer.SEALED
        wire.to_sender.append((incoming.sequence, answer))

    # The network.

    def break_wire(self) -> None:
        self.lose(self.rng.randrange(NUM_SENDERS))

    def lose(self, number: int) -> None:
        """Both ends find the connection broken, whatever was under way."""
        wire, self.wires[number] = self.wires[number], None
        if wire is None:
            return
        self.lose_offer(number, wire)
        if (incoming := wire.incoming) is not None:
            self.book.close(incoming.attempt)
            self.rooms[incoming.attempt.push.attempt].is_held = False
            self.late.append((self.blocks, incoming))

    def lose_offer(self, number: int, wire: Wire) -> None:
        offered, wire.offered = wire.offered, None
        if offered is None:
            return
        may_read = offered.machine.peer_may_read
        self.hazards["broken while it may be read"] += may_read
        self.sender_blocks[number].give_back(offered.block, reusable=not may_read)
        if offered.order in self.orders[number]:
            self.orders[number].remove(offered.order)

    def break_half(self) -> None:
        """The sender finds out first; the receiver reads on for a while."""
        number = self.rng.randrange(NUM_SENDERS)
        wire = self.wires[number]
        if wire is not None and wire.offered is not None:
            self.hazards["read after the sender had left"] += wire.offered.machine.peer_may_read
            self.lose_offer(number, wire)
            wire.is_half = True
            wire.to_sender.clear()

    def late_write(self) -> None:
        """A receive that was given up ends, with a write or without one; its block is free now."""
        if not self.late:
            return
        blocks, incoming = self.late.pop(self.rng.randrange(len(self.late)))
        if self.rng.random() < 0.5:
            self.hazards["late write"] += 1
            if incoming.block.generation != incoming.generation:
                self.fail("a late write hit staging that was given to somebody else")
            incoming.block.data[-1] = "late"
        blocks.give_back(incoming.block)

    def queue(self) -> deque[object] | None:
        wire = self.rng.choice(self.wires)
        return wire.to_receiver if wire is not None and wire.to_receiver else None

    def repeat(self) -> None:
        """A message arrives twice: bytes, or an offer, perhaps much later and elsewhere."""
        wire = self.rng.choice(self.wires)
        if wire is not None and self.said:
            # A second read of a sender's memory does not happen; bytes on a wire may come twice.
            first = self.rng.choice(self.said) if self.rng.random() < 0.7 else "again"
            self.hazards["repeated"] += 1
            wire.to_receiver.append(first)

    def repeat_answer(self) -> None:
        wire = self.rng.choice(self.wires)
        if wire is not None and wire.to_sender:
            wire.to_sender.append(wire.to_sender[0])

    def swap(self) -> None:
        queue = self.queue()
        if queue is not None and len(queue) > 1:
            self.hazards["reordered"] += 1
            queue.rotate(1)

    def drop(self) -> None:
        queue = self.queue()
        if queue is not None:
            self.hazards["dropped"] += 1
            queue.popleft()

    def flip(self) -> None:
        queue = self.queue()
        if queue is not None and isinstance(queue[0], tuple):
            queue[0] = (queue[0][0], -1)

    # The rules.

    def fail(self, problem: str) -> None:
        raise Violated(f"seed {self.seed}: {problem}")

    def check(self) -> None:
        arriving = sum(wire is not None and wire.incoming is not None for wire in self.wires)
        if self.blocks.in_use != arriving + len(self.late):
            self.fail("the receiver's staging is not conserved")
        for wire, blocks in zip(self.wires, self.sender_blocks, strict=True):
            if blocks.in_use != (wire is not None and wire.offered is not None):
                self.fail("a sender's staging is not conserved")

    def end(self) -> None:
        """Whatever is left ends: then all memory is free, and what was sealed is what was sent."""
        for number in range(NUM_SENDERS):
            self.lose(number)
        while self.late:
            self.late_write()
        for room in self.rooms.values():
            self.book.close(room.attempt)
        self.check()
        if self.blocks.in_use or len(self.book) or len(self.blocks.free) != RECEIVER_BLOCKS:
            self.fail("the receiver leaks")
        for room in self.rooms.values():
            order = room.order
            sent = [[order.content(p, n) for n in range(MESSAGES)] for p in range(order.num_parts)]
            if room.commits > 1:
                self.fail(f"{order.request_id} was committed {room.commits} times")
            if room.commits and room.parts != sent:
                self.fail(f"{order.request_id} differs from what was sent")
            self.hazards["sealed"] += room.commits
            self.hazards["sealed in parts"] += room.commits and order.num_parts > 1
