"""transformers as a contender, through ``generate``. Started by contenders.py, not by hand."""

from __future__ import annotations

import os
import time
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from child_loop import Sample, serve


class _Clock(transformers.StoppingCriteria):
    """Asked after every token; never stops."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


def load(request: dict[str, Any]) -> tuple[str, int, Sample]:
    torch.set_num_threads(request["threads"])
    transformers.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        request["checkpoint"], dtype=getattr(torch, request["dtype"])
    ).eval()

    @torch.inference_mode()
    def sample(prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
        ids = torch.tensor(prompts)
        clock = _Clock()
        start = time.perf_counter()
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=0,
            stopping_criteria=transformers.StoppingCriteriaList([clock]),
        )
        if len(clock.times) != new_tokens:
            raise RuntimeError(f"{len(clock.times)} steps instead of {new_tokens}")
        return {
            "first_s": clock.times[0] - start,
            "rest_s": clock.times[-1] - clock.times[0],
            "rest_tokens": (new_tokens - 1) * len(prompts),
            "tokens": out[:, ids.shape[1] :][:, :8].tolist(),
        }

    version = f"{transformers.__version__}, torch {torch.__version__}"
    return version, model.config.vocab_size, sample


if __name__ == "__main__":
    serve(load)
