"""A worker's ends of the hand-off, built from its settings."""

from __future__ import annotations

from stateferry.config import TransferSection
from stateferry.core.errors import ConfigError
from stateferry.transfer.limits import TransferLimits
from stateferry.transfer.transport import Transport
from stateferry.transfer.ucx import TUNED_VARIABLES, UcxSettings, UcxTransport


def transfer_limits(section: TransferSection) -> TransferLimits:
    """Raises ConfigError naming a limit that is not positive."""
    return TransferLimits(
        max_handoff_bytes=section.max_handoff_bytes,
        staging_bytes=section.staging_bytes,
        connect_timeout_s=section.connect_timeout_s,
        progress_timeout_s=section.progress_timeout_s,
    )


def build_transport(section: TransferSection, host: str, port: int) -> Transport:
    """The configured transport; should it listen, then on ``port``, known to peers as ``host``.

    Raises ConfigError on an unknown name.
    """
    if section.transport != "ucx":
        raise ConfigError("transfer.transport", f"{section.transport!r} is not ucx")
    variables = dict(TUNED_VARIABLES)
    if section.ucx_tls:
        variables["UCX_TLS"] = section.ucx_tls
    return UcxTransport(UcxSettings(host=host, port=port, variables=variables))
