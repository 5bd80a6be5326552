"""Mamba-2: embedding, a stack of (norm, mixer, residual), norm, head.

mixer:  in_proj -> z | xBC | dt
        xBC -> causal conv, SiLU -> x | B | C
        (x, dt, B, C) -> state space model -> y
        y, z -> gated norm -> out_proj
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from stateferry.models.config import Mamba2Config
from stateferry.models.weights import Progress, TensorSpec, load_weights
from stateferry_kernels.layer_state import ConvParams, LayerState, SsmLayerParams
from stateferry_kernels.operations import Kernels
from stateferry_kernels.plans import CommitPlan, DecodePlan, ExtendPlan

_FP32 = torch.float32


@dataclass(frozen=True, slots=True)
class Mixer:
    """One layer's weights, activation dtype unless said otherwise."""

    norm: torch.Tensor  # (d_model,)
    in_proj: torch.Tensor  # (d_inner + conv_dim + nheads, d_model)
    in_bias: torch.Tensor | None
    conv: ConvParams
    ssm: SsmLayerParams  # fp32
    gated_norm: torch.Tensor  # (d_inner,)
    out_proj: torch.Tensor  # (d_model, d_inner)
    out_bias: torch.Tensor | None


class Mamba2Model:
    """Stateless: sequences live in the ``states`` that each call is given, one per layer."""

    def __init__(
        self,
        config: Mamba2Config,
        kernels: Kernels,
        embedding: torch.Tensor,
        layers: Sequence[Mixer],
        final_norm: torch.Tensor,
        head: torch.Tensor,
    ) -> None:
        self.config = config
        self._kernels = kernels
        self._embedding = embedding
        self._layers = tuple(layers)
        self._final_norm = final_norm
        self._head = head

    @property
    def dtype(self) -> torch.dtype:
        """Activation dtype."""
        return self._embedding.dtype

    def extend(
        self,
        token_ids: torch.Tensor,
        plan: ExtendPlan,
        states: Sequence[LayerState],
        last_rows: Sequence[int],
    ) -> torch.Tensor:
        """Consume a packed batch: token_ids (total_tokens,) int64.

        Returns logits (len(last_rows), vocab_size) fp32 of the rows asked for. Mutates ``states``
        as the plan says.
        """

        def conv(xBC: torch.Tensor, layer: Mixer, state: LayerState, out: torch.Tensor) -> None:
            self._kernels.causal_conv1d_extend(
                xBC, conv=layer.conv, plan=plan, state=state, out=out
            )

        def ssm(
            x: torch.Tensor,
            dt: torch.Tensor,
            B: torch.Tensor,
            C: torch.Tensor,
            layer: Mixer,
            state: LayerState,
            out: torch.Tensor,
        ) -> None:
            self._kernels.chunk_scan(x, dt, B, C, params=layer.ssm, plan=plan, state=state, out=out)

        hidden = self._backbone(token_ids, states, conv, ssm)
        return self._logits(hidden[list(last_rows)])

    def decode(
        self, token_ids: torch.Tensor, plan: DecodePlan, states: Sequence[LayerState]
    ) -> torch.Tensor:
        """Consume one token per sequence: token_ids (num_seqs,) int64.

        Returns logits (num_seqs, vocab_size) fp32. Appends to the tails; commits nothing.
        """

        def conv(xBC: torch.Tensor, layer: Mixer, state: LayerState, out: torch.Tensor) -> None:
            self._kernels.causal_conv1d_row(xBC, conv=layer.conv, plan=plan, state=state, out=out)

        def ssm(
            x: torch.Tensor,
            dt: torch.Tensor,
            B: torch.Tensor,
            C: torch.Tensor,
            layer: Mixer,
            state: LayerState,
            out: torch.Tensor,
        ) -> None:
            self._kernels.decode_row(x, dt, B, C, params=layer.ssm, plan=plan, state=state, out=out)

        return self._logits(self._backbone(token_ids, states, conv, ssm))

    def commit(self, plan: CommitPlan, states: Sequence[LayerState]) -> None:
        """Fold full tails into fresh slots, on every layer."""
        for layer, state in zip(self._layers, states, strict=True):
            self._kernels.commit(params=layer.ssm, plan=plan, state=state)

    def _backbone(
        self,
        token_ids: torch.Tensor,
        states: Sequence[LayerState],
        conv: Callable[[torch.Tensor, Mixer, LayerState, torch.Tensor], None],
        ssm: Callable[..., None],
    ) -> torch.Tensor:
        config, kernels = self.config, self._kernels
        d_inner, bc_dim = config.d_inner, config.ngroups * config.dstate
        hidden = self._embedding[token_ids]
        residual = hidden.to(_FP32) if config.residual_in_fp32 else hidden
        for layer, state in zip(self._layers, states, strict=True):
            normed = kernels.rms_norm(residual, layer.norm, config.norm_eps)
            zxbcdt = kernels.linear(normed, layer.in_proj, layer.in_bias)
            z, xBC, dt = torch.split(zxbcdt, [d_inner, config.conv_dim, config.nheads], dim=-1)
            activated = torch.empty_like(xBC, memory_format=torch.contiguous_format)
            conv(xBC, layer, state, activated)
            x, B, C = torch.split(activated, [d_inner, bc_dim, bc_dim], dim=-1)
            y = torch.empty_like(x, memory_format=torch.contiguous_format)
            ssm(
                _heads(x, config.nheads),
                dt,
                _heads(B, config.ngroups),
                _heads(C, config.ngroups),
                layer,
                state,
                _heads(y, config.nheads),
            )
            group_size = d_inner // config.ngroups
            gated = kernels.gated_rms_norm(y, z, layer.gated_norm, config.norm_eps, group_size)
            residual = residual + kernels.linear(gated, layer.out_proj, layer.out_bias)
        return residual

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        normed = self._kernels.rms_norm(hidden, self._final_norm, self.config.norm_eps)
        return self._kernels.linear(normed, self._head, None).float()


def _heads(rows: torch.Tensor, count: int) -> torch.Tensor:
    """(num_rows, count * dim) seen as (num_rows, count, dim)."""
    return rows.view(rows.shape[0], count, rows.shape[1] // count)


def load_mamba2(
    model_dir: Path,
    config: Mamba2Config,
    dtype: torch.dtype,
    kernels: Kernels,
    progress: Progress | None = None,
) -> Mamba2Model:
    """Load a Hugging Face ``Mamba2ForCausalLM`` directory. Raises ModelError."""
    wanted = _top_specs(config, dtype)
    for number in range(config.num_layers):
        wanted |= _layer_specs(config, dtype, f"backbone.layers.{number}.")
    # Some writers store a tied head once more; it is the embedding.
    ignored = frozenset({"lm_head.weight"}) if config.tie_embeddings else frozenset()
    weights = load_weights(model_dir, wanted, ignored, progress)
    embedding = weights["backbone.embeddings.weight"]
    return Mamba2Model(
        config,
        kernels,
        embedding=embedding,
        layers=[
            _layer(config, weights, f"backbone.layers.{number}.")
            for number in range(config.num_layers)
        ],
        final_norm=weights["backbone.norm_f.weight"],
        head=embedding if config.tie_embeddings else weights["lm_head.weight"],
    )


def _top_specs(config: Mamba2Config, dtype: torch.dtype) -> dict[str, TensorSpec]:
    table = TensorSpec((config.vocab_size, config.d_model), dtype)
    specs = {
        "backbone.embeddings.weight": table,
        "backbone.norm_f.weight": TensorSpec((config.d_model,), dtype),
    }
    if not config.tie_embeddings:
        specs["lm_head.weight"] = table
    return specs


def _layer_specs(config: Mamba2Config, dtype: torch.dtype, prefix: str) -> dict[str, TensorSpec]:
    projected = config.d_inner + config.conv_dim + config.nheads
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "norm.weight": ((config.d_model,), dtype),
        "mixer.in_proj.weight": ((projected, config.d_model), dtype),
        "mixer.conv1d.weight": ((config.conv_dim, 1, config.d_conv), dtype),
        "mixer.A_log": ((config.nheads,), _FP32),
        "mixer.D": ((config.nheads,), _FP32),
        "mixer.dt_bias": ((config.nheads,), _FP32),
        "mixer.norm.weight": ((config.d_inner,), dtype),
        "mixer.out_proj.weight": ((config.d_model, config.d_inner), dtype),
    }
    if config.conv_bias:
        shapes["mixer.conv1d.bias"] = ((config.conv_dim,), dtype)
    if config.in_out_bias:
        shapes["mixer.in_proj.bias"] = ((projected,), dtype)
        shapes["mixer.out_proj.bias"] = ((config.d_model,), dtype)
    return {prefix + name: TensorSpec(*spec) for name, spec in shapes.items()}


def _layer(config: Mamba2Config, weights: dict[str, torch.Tensor], prefix: str) -> Mixer:
    def of(name: str) -> torch.Tensor:
        return weights[prefix + name]

    return Mixer(
        norm=of("norm.weight"),
        in_proj=of("mixer.in_proj.weight"),
        in_bias=weights.get(prefix + "mixer.in_proj.bias"),
        conv=ConvParams(
            weight=of("mixer.conv1d.weight").squeeze(1),
            bias=weights.get(prefix + "mixer.conv1d.bias"),
        ),
        ssm=SsmLayerParams(
            A=-torch.exp(of("mixer.A_log")),
            D=of("mixer.D"),
            dt_bias=of("mixer.dt_bias"),
            dt_softplus=True,
            dt_limit=config.dt_limit,
        ),
        gated_norm=of("mixer.norm.weight"),
        out_proj=of("mixer.out_proj.weight"),
        out_bias=weights.get(prefix + "mixer.out_proj.bias"),
    )
