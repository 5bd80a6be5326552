"""A local cluster in the foreground, until Ctrl-C."""

from __future__ import annotations

import signal
import threading
from types import FrameType

from rich.console import Console

from stateferry.config import Config
from stateferry.core.errors import Unavailable
from stateferry.local.cluster import ROUTER, LocalCluster
from stateferry.local.tables import address_table
from stateferry.local.view import ClusterView

_POLL_S = 0.2


def serve(config: Config, prefill: int, decode: int, *, show_logs: bool = True) -> int:
    """Run a cluster until SIGINT or SIGTERM, or until nothing of it is left.

    A second signal ends the children at once. Returns the exit code: 1 when a child had died.
    Raises Unavailable when the cluster does not come up.
    """
    console = Console(stderr=True)
    view = ClusterView(console, show_logs=show_logs)
    cluster = LocalCluster(
        config,
        prefill=prefill,
        decode=decode,
        on_line=view.line,
        on_death=view.death,
        on_status=view.status,
    )
    stopping = threading.Event()
    try:
        _stop_on_signals(cluster, stopping)
        cluster.start()
        view.started()
        console.print(address_table(cluster.addresses, cluster.pids))
        console.print(
            'Try: stateferry generate "It was a bright cold morning, and" '
            f"--router {cluster.router_address}",
            soft_wrap=True,
            highlight=False,
        )
        if http := cluster.addresses[ROUTER].get("http"):
            console.print(f"OpenAI clients: http://{http}/v1", soft_wrap=True, highlight=False)
        while cluster.num_running and not stopping.wait(_POLL_S):
            pass
        console.print("stopping" if stopping.is_set() else "no process is left")
    except Unavailable as error:
        if not stopping.is_set():
            if show_logs:
                # The lines that follow in the error are on the screen already.
                raise Unavailable(str(error).partition("\n")[0]) from error
            raise
        console.print("stopped while starting")
    finally:
        view.started()
        cluster.stop()
    return 1 if cluster.deaths else 0


def _stop_on_signals(cluster: LocalCluster, stopping: threading.Event) -> None:
    def on_signal(number: int, frame: FrameType | None) -> None:
        if stopping.is_set():
            cluster.kill_all()
            return
        stopping.set()
        cluster.abandon()

    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)
