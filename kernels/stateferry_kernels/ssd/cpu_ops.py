"""The chunk scan on the CPU: native/src/scan.h."""

from __future__ import annotations

import torch

from stateferry_kernels.guards import check_extend_plan, check_ssm_inputs
from stateferry_kernels.layer_state import LayerState, SsmLayerParams
from stateferry_kernels.native.arguments import Rows, extend_struct, layer_struct, params_struct
from stateferry_kernels.native.library import native
from stateferry_kernels.plans import ExtendPlan


def chunk_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    *,
    params: SsmLayerParams,
    plan: ExtendPlan,
    state: LayerState,
    out: torch.Tensor,
    z: torch.Tensor | None = None,
) -> None:
    """Consume a packed batch of tokens, each sequence on its own absolute grid.

    Args, what is mutated and errors: as ``ssd.torch_ops.chunk_scan``.
    Precision: fp32, every sum in one order (native/src/tile.h): a token's bits are those that
               decode rows and draft rows give.
    """
    check_ssm_inputs(x, dt, B, C, z, out, params, state, plan.total_tokens)
    check_extend_plan(plan, state)
    rows = Rows(x, dt, B, C, z, out)
    native().chunk_scan(
        layer_struct(state),
        params_struct(params),
        extend_struct(plan),
        rows.struct,
        torch.get_num_threads(),
    )
