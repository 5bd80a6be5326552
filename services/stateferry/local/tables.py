"""Tables of processes, for terminals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table

from stateferry.v1 import membership_pb2

_COLUMNS = ("grpc", "transfer", "metrics")


def address_table(addresses: Mapping[str, Mapping[str, str]], pids: Mapping[str, int]) -> Table:
    """Where each process listens."""
    table = Table("process", "pid", *_COLUMNS)
    for name, parts in addresses.items():
        table.add_row(name, str(pids[name]), *(parts.get(column, "") for column in _COLUMNS))
    return table


def worker_table(workers: Sequence[membership_pb2.WorkerStatus]) -> Table:
    """One row per worker."""
    table = Table(
        "worker", "role", "model", "active", "queued", "slots used", "pages used", "kernels",
        "silent", "grpc", "transfer", "metrics",
    )  # fmt: skip
    for worker in workers:
        what, load = worker.description, worker.load
        role = membership_pb2.WorkerRole.Name(what.role).removeprefix("WORKER_ROLE_").lower()
        table.add_row(
            what.worker_id,
            role,
            what.fingerprint.model,
            f"{load.active_requests}/{what.capacity_requests}",
            str(load.queued_requests),
            f"{load.state_slots_total - load.state_slots_free}/{load.state_slots_total}",
            f"{load.tail_pages_total - load.tail_pages_free}/{load.tail_pages_total}",
            what.kernels,
            f"{worker.silence_s:.1f} s",
            what.grpc_address,
            what.transfer_address or "-",
            what.metrics_address,
        )
    return table
