"""Operations with the names, arguments and results of mamba_ssm, causal_conv1d and SGLang: for
people who come from there and want to change an import only. Inference only: no gradients."""

from stateferry_kernels.parity.chunk_scan import mamba_chunk_scan_combined
from stateferry_kernels.parity.conv1d import causal_conv1d_fn
from stateferry_kernels.parity.conv1d_update import causal_conv1d_update
from stateferry_kernels.parity.state_update import selective_state_update

__all__ = [
    "causal_conv1d_fn",
    "causal_conv1d_update",
    "mamba_chunk_scan_combined",
    "selective_state_update",
]
