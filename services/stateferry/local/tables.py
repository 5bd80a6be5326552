"""Tables of processes, narrow enough for a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich import box
from rich.filesize import decimal
from rich.table import Table

from stateferry.v1 import membership_pb2

_ADDRESSES = ("grpc", "transfer", "metrics")


def address_table(addresses: Mapping[str, Mapping[str, str]], pids: Mapping[str, int]) -> Table:
    """Where the processes of a local cluster listen."""
    table = _table("process", "pid", *_ADDRESSES)
    for name, parts in addresses.items():
        table.add_row(name, str(pids[name]), *(parts.get(a) or "-" for a in _ADDRESSES))
    return table


def load_table(workers: Sequence[membership_pb2.WorkerStatus]) -> Table:
    """How busy workers are: requests of capacity, and those in their queue."""
    table = _table("worker", "role", "model", "active", "queued", "kernels")
    for worker in workers:
        what, load = worker.description, worker.load
        role = membership_pb2.WorkerRole.Name(what.role).removeprefix("WORKER_ROLE_").lower()
        table.add_row(
            what.worker_id,
            role,
            what.fingerprint.model,
            f"{load.active_requests}/{what.capacity_requests}",
            str(load.queued_requests),
            what.kernels,
        )
    return table


def memory_table(workers: Sequence[membership_pb2.WorkerStatus]) -> Table:
    """Workers' memory for sequences: in use of all there are, and the size of one of each."""
    table = _table("worker", "state slots", "tail pages", "KV pages", "all pools")
    for worker in workers:
        load, pools = worker.load, worker.description.pools
        kinds = (
            (load.state_slots_free, load.state_slots_total, pools.state_slot_bytes),
            (load.tail_pages_free, load.tail_pages_total, pools.tail_page_bytes),
            (load.kv_pages_free, load.kv_pages_total, pools.kv_page_bytes),
        )
        cells = [
            f"{total - free}/{total} of {decimal(each)}" if each else "-"
            for free, total, each in kinds
        ]
        counts = (pools.state_slots, pools.tail_pages, pools.kv_pages)
        size_bytes = sum(n * each for n, (_, _, each) in zip(counts, kinds, strict=True))
        table.add_row(worker.description.worker_id, *cells, decimal(size_bytes))
    return table


def worker_address_table(workers: Sequence[membership_pb2.WorkerStatus]) -> Table:
    """Where workers listen, and how long ago the router heard of them."""
    table = _table("worker", *_ADDRESSES, "heard of")
    for worker in workers:
        what = worker.description
        table.add_row(
            what.worker_id,
            what.grpc_address,
            what.transfer_address or "-",
            what.metrics_address,
            f"{worker.silence_s:.1f} s ago",
        )
    return table


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, overflow="fold")
    return table
