"""llama.cpp's own converter on our random-weight checkpoints: started by contenders.py as
``gguf_convert.py LLAMA_DIR CHECKPOINT OUTFILE OUTTYPE``.

Two things about them are news to it: a tokenizer of bare bytes, and a NemotronH whose config.json
has the numbers of experts, as transformers writes them, without a layer that has any.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

_LETTERS = {"linear_attention": "M", "full_attention": "*", "mlp": "-"}


def dense(hparams: dict[str, Any]) -> dict[str, Any]:
    """A hybrid without experts, in the words of a config.json that never knew of any."""
    kinds = hparams.get("layers_block_type")
    if not kinds or not set(kinds) <= set(_LETTERS):
        return hparams
    kept = {k: v for k, v in hparams.items() if k not in ("num_experts_per_tok", "num_experts")}
    del kept["layers_block_type"]
    pattern = "".join(_LETTERS[kind] for kind in kinds)
    return {**kept, "hybrid_override_pattern": pattern, "num_hidden_layers": len(kinds)}


def main(root: str, checkpoint: str, outfile: str, outtype: str) -> None:
    sys.path[:0] = [root, str(Path(root) / "gguf-py")]
    from conversion import base

    load = base.ModelBase.load_hparams
    base.ModelBase.load_hparams = staticmethod(lambda *given, **named: dense(load(*given, **named)))
    base.TextModel.get_vocab_base_pre = lambda *_: "gpt-2"
    sys.argv = ["convert", checkpoint, "--outfile", outfile, "--outtype", outtype]
    runpy.run_path(str(Path(root) / "convert_hf_to_gguf.py"), run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])
