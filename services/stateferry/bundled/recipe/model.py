"""The language model in plain torch, with the parameter names transformers uses.

Same names means that export is a cast and a rename-free copy. A layer is `x + mixer(norm(x))`;
what a layer's mixer is comes from `ModelConfig.layer_types`.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from stateferry.bundled.recipe.config import ModelConfig
from stateferry.bundled.recipe.mixers import MIXERS, RMSNorm


class Layer(nn.Module):
    """x + dropout(mixer(norm(x)))."""

    def __init__(self, kind: str, config: ModelConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mixer = MIXERS[kind](config)
        self.dropout = config.dropout

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, length, hidden_size); the residual stream keeps its dtype."""
        branch = self.mixer(self.norm(x))
        return x + F.dropout(branch, self.dropout, self.training).to(x.dtype)


class Backbone(nn.Module):
    """Embedding, layers, final norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        nn.init.normal_(self.embeddings.weight, std=0.02)
        self.layers = nn.ModuleList(Layer(kind, config) for kind in config.layer_types)
        self.norm_f = RMSNorm(config.hidden_size, config.layer_norm_epsilon)

    def forward(self, ids: Tensor) -> Tensor:
        """ids: (batch, length) int64. Returns (batch, length, hidden_size)."""
        x = self.embeddings(ids)
        for layer in self.layers:
            x = layer(x)
        normed: Tensor = self.norm_f(x)
        return normed


class LanguageModel(nn.Module):
    """Next-token logits."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = Backbone(config)
        if not config.tied:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            nn.init.normal_(self.lm_head.weight, std=0.02)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: (..., hidden_size). Returns (..., vocab_size)."""
        tied = self.config.tied
        return F.linear(hidden, (self.backbone.embeddings if tied else self.lm_head).weight)

    def forward(self, ids: Tensor) -> Tensor:
        """ids: (batch, length) int64. Returns logits (batch, length, vocab_size)."""
        return self.logits(self.backbone(ids))

    def loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Mean negative log likelihood in nats; ids and targets: (batch, length) int64."""
        logits = self(ids).float()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
