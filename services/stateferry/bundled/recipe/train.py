"""Train against a clock: the learning rate follows elapsed time, so a run ends when it must."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stateferry.bundled.recipe import checkpoint
from stateferry.bundled.recipe.config import ModelConfig
from stateferry.bundled.recipe.data import Starts, TokenData
from stateferry.bundled.recipe.model import LanguageModel

LOG_EVERY_STEPS = 50
WARMUP_STEPS = 300
MAX_GRAD_NORM = 1.0
EVALUATION_WINDOWS = 96


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """`max_seconds` bounds this run; the schedule ends at `schedule_seconds` over all runs."""

    work: Path
    output: Path
    max_seconds: float
    schedule_seconds: float
    batch: int = 96
    length: int = 1024
    peak_rate: float = 4e-3
    weight_decay: float = 0.3
    evaluate_every_seconds: float = 60.0
    seed: int = 1
    compiled: bool = True
    resume: Path | None = None
    device: str = "cuda" if torch.cuda.is_available() else "cpu"


def learning_rate(settings: TrainSettings, step: int, elapsed: float) -> float:
    """Linear warm-up in steps, then a cosine in elapsed seconds down to zero."""
    warm = min(1.0, (step + 1) / WARMUP_STEPS)
    done = min(1.0, elapsed / settings.schedule_seconds)
    return settings.peak_rate * warm * 0.5 * (1 + math.cos(math.pi * done))


def make_optimizer(model: LanguageModel, settings: TrainSettings) -> torch.optim.AdamW:
    """Decay matrices only: norms, biases and the SSD's A, D and dt have no reason to shrink."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    fused = settings.device.startswith("cuda")
    return torch.optim.AdamW(groups, lr=settings.peak_rate, betas=(0.9, 0.95), fused=fused)


class Batches:
    """Endless batches over epochs; tokens live on the device as int32."""

    def __init__(self, data: TokenData, settings: TrainSettings, seed: int) -> None:
        self.data, self.settings = data, settings
        self.rng = np.random.default_rng(seed)
        self.tokens = torch.from_numpy(data.tokens.astype(np.int32)).to(settings.device)
        self.offsets = torch.arange(settings.length + 1, device=settings.device)
        self.starts: Starts = np.zeros(0, dtype=np.int64)

    def take(self, starts: Starts) -> tuple[Tensor, Tensor]:
        """ids and next ids of the windows at `starts`: two (batch, length) int64 tensors."""
        index = torch.from_numpy(starts).to(self.offsets.device)[:, None] + self.offsets
        window = self.tokens[index].long()
        return window[:, :-1], window[:, 1:]

    def next(self) -> tuple[Tensor, Tensor]:
        """The next training batch."""
        if len(self.starts) < self.settings.batch:
            fresh = self.data.epoch(self.settings.length, self.rng)
            self.starts = np.concatenate([self.starts, fresh])
        taken, self.starts = np.split(self.starts, [self.settings.batch])
        return self.take(taken)


@torch.no_grad()
def heldout_loss(model: LanguageModel, batches: Batches) -> float:
    """Mean nats per token on a fixed sample of held-out windows."""
    model.eval()
    starts = batches.data.even_sample(batches.settings.length, EVALUATION_WINDOWS)
    losses = []
    for part in np.array_split(starts, max(1, EVALUATION_WINDOWS // 32)):
        with torch.autocast(batches.settings.device, dtype=torch.bfloat16):
            losses.append(float(model.loss(*batches.take(part))))
    model.train()
    return sum(losses) / len(losses)


class Run:
    """The loop's state: model, optimiser, clocks and log."""

    def __init__(self, settings: TrainSettings, config: ModelConfig) -> None:
        torch.manual_seed(settings.seed)
        torch.set_float32_matmul_precision("high")
        self.settings = settings
        self.step, self.elapsed_before, self.log = 0, 0.0, list[dict[str, float]]()
        if settings.resume is None:
            self.model = LanguageModel(config).to(settings.device)
        else:
            loaded, progress = checkpoint.load_model(settings.resume)
            self.model = loaded.to(settings.device)
            self.step, self.log = int(progress["step"]), list(progress["log"])
            self.elapsed_before = float(progress["elapsed"])
        self.optimizer = make_optimizer(self.model, settings)
        if settings.resume is not None:
            checkpoint.restore_moments(settings.resume, self.model, self.optimizer, self.step)
        seed = settings.seed + 1000 * self.step  # a resumed run must not replay its first epochs
        self.batches = Batches(TokenData(settings.work, "train"), settings, seed)
        self.heldout = Batches(TokenData(settings.work, "heldout"), settings, seed)
        self.loss = torch.compile(self.model.loss) if settings.compiled else self.model.loss
        self.started = time.monotonic()

    def train_step(self) -> Tensor:
        """One optimiser step; returns the detached loss without waiting for the device."""
        elapsed = self.elapsed_before + time.monotonic() - self.started
        rate = learning_rate(self.settings, self.step, elapsed)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast(self.settings.device, dtype=torch.bfloat16):
            loss: Tensor = self.loss(*self.batches.next())
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRAD_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return loss.detach()

    def save(self) -> None:
        """Write everything a later run needs to go on."""
        elapsed = self.elapsed_before + time.monotonic() - self.started
        progress = {"step": self.step, "elapsed": elapsed, "log": self.log}
        checkpoint.save(self.settings.output, self.model, self.optimizer, progress)

    def report(self, train_loss: float, tokens_per_second: float) -> None:
        """Evaluate, log and save; the best weights so far are kept in a directory of their own."""
        row = {
            "step": self.step,
            "seconds": round(self.elapsed_before + time.monotonic() - self.started, 1),
            "train_nats": round(train_loss, 4),
            "heldout_nats": round(heldout_loss(self.model, self.heldout), 4),
            "tokens_per_second": round(tokens_per_second),
        }
        self.log.append(row)
        print(json.dumps(row), flush=True)
        self.save()
        if row["heldout_nats"] <= min(other["heldout_nats"] for other in self.log):
            best = self.settings.output.with_name(self.settings.output.name + "-best")
            checkpoint.save(best, self.model, None, {"step": self.step, "log": self.log})


def train(settings: TrainSettings, config: ModelConfig) -> None:
    """Train until `max_seconds` of this run are over; the clock starts after the first step."""
    begun = time.monotonic()
    run = Run(settings, config)
    average = float(run.train_step())
    print(f"first step after {time.monotonic() - begun:.1f} s, loss {average:.3f}", flush=True)
    run.started = last = time.monotonic()
    last_step = run.step
    while time.monotonic() - run.started < settings.max_seconds:
        loss = run.train_step()
        if run.step % LOG_EVERY_STEPS == 0:
            # Reading the loss waits for the device, which also keeps the clock honest.
            average = 0.9 * average + 0.1 * float(loss)
            if not math.isfinite(average):
                raise FloatingPointError(f"loss is not finite at step {run.step}")
        now = time.monotonic()
        if now - last > settings.evaluate_every_seconds:
            tokens = (run.step - last_step) * settings.batch * settings.length
            run.report(average, tokens / (now - last))
            last, last_step = time.monotonic(), run.step
    run.report(average, 0.0)
