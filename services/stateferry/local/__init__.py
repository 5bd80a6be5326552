"""A whole cluster on one machine: the supervisor behind ``serve``, ``demo`` and the tests."""

from stateferry.local.child import Death
from stateferry.local.cluster import LocalCluster

__all__ = ["Death", "LocalCluster"]
