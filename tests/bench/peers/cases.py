"""What is measured: so many prompts of so many tokens, continued by so many."""

from __future__ import annotations

from dataclasses import dataclass, replace

MODELS = ("mamba2-small", "nemotron_h-small")
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Case:
    """``kind`` says which part counts: ``prefill`` to the first token, ``decode`` after it."""

    name: str
    kind: str
    batch: int
    prompt_tokens: int
    new_tokens: int

    @property
    def shortened(self) -> Case:
        """A look at how fast somebody is. A prefill keeps a whole chunk of the largest chunk size:
        some pad to it."""
        prompt = min(self.prompt_tokens, 256 if self.kind == "prefill" else 32)
        new = min(self.new_tokens, 4)
        return replace(self, prompt_tokens=prompt, new_tokens=new)

    @property
    def request(self) -> dict[str, int]:
        """As children are asked."""
        return {
            "batch": self.batch,
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
        }


def _prefill(tokens: int) -> Case:
    return Case(f"prefill {tokens}", "prefill", 1, tokens, 1)


def _decode(batch: int, steps: int) -> Case:
    # The prompt of the peers' own benchmarks: short, so that decoding is what takes the time.
    return Case(f"decode batch {batch}", "decode", batch, 32, 1 + steps)


# 64 steps: whole intervals of our grid, so that commits count as often as they happen.
FULL = (_prefill(512), _prefill(2048), _decode(1, 64), _decode(8, 64))
QUICK = (_prefill(512), _decode(1, 64), _decode(8, 64))
TINY = (_prefill(70), _decode(2, 4))
# What the cluster and the engine are compared on.
SERVING = Case("8 requests of 512 in, 128 out", "serving", 8, 512, 128)
