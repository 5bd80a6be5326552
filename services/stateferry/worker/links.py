"""A worker's ends of the hand-off, built from its settings."""

from __future__ import annotations

from stateferry.cache.pools import SequencePools
from stateferry.config import TransferSection
from stateferry.core.errors import ConfigError
from stateferry.transfer.limits import TransferLimits
from stateferry.transfer.ucx import TUNED_VARIABLES, UcxSettings, UcxTransport
from stateferry.worker.limits import ModelLimits


def transfer_limits(section: TransferSection) -> TransferLimits:
    """Raises ConfigError naming a limit that is not positive."""
    return TransferLimits(
        max_handoff_bytes=section.max_handoff_bytes,
        staging_bytes=section.staging_bytes,
        connect_timeout_s=section.connect_timeout_s,
        progress_timeout_s=section.progress_timeout_s,
    )


def build_transport(section: TransferSection, host: str, port: int) -> UcxTransport:
    """UCX; should it listen, then on ``port``, known to peers as ``host``."""
    variables = dict(TUNED_VARIABLES)
    if section.ucx_tls:
        variables["UCX_TLS"] = section.ucx_tls
    return UcxTransport(UcxSettings(host=host, port=port, variables=variables))


def check_handoff_fits(pools: SequencePools, limits: ModelLimits, section: TransferSection) -> None:
    """Raises ConfigError naming the limit that the largest hand-off would exceed."""
    longest = limits.max_context_tokens
    needed = pools.max_sequence_bytes(longest)
    for key in ("max_handoff_bytes", "staging_bytes"):
        allowed = getattr(section, key)
        if needed > allowed:
            problem = (
                f"{allowed} is less than the {needed} bytes that the state of "
                f"model.max_context_tokens = {longest} may take"
            )
            raise ConfigError(f"transfer.{key}", problem)
