"""Asks a router which workers it can see."""

from __future__ import annotations

import grpc

from stateferry.v1 import membership_pb2, membership_pb2_grpc

_TIMEOUT_S = 2.0


def joined_workers(router_address: str) -> frozenset[str]:
    """Ids of the workers that have joined; empty while the router does not answer."""
    with grpc.insecure_channel(router_address) as channel:
        stub = membership_pb2_grpc.MembershipStub(channel)
        try:
            reply = stub.ListWorkers(membership_pb2.ListWorkersRequest(), timeout=_TIMEOUT_S)
        except grpc.RpcError:
            return frozenset()
    return frozenset(worker.description.worker_id for worker in reply.workers)
