"""llama.cpp's own converter on our random-weight checkpoints: started by contenders.py as
``gguf_convert.py LLAMA_DIR CHECKPOINT OUTFILE OUTTYPE``.

Three things about them are news to it: a tokenizer that it does not know by its hash, one without a
single merge, and a NemotronH whose config.json has the numbers of experts, as transformers writes
them, without a layer that has any.
"""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path
from typing import Any

_OF_EXPERTS = re.compile(r"expert|^moe_|^n_group$|topk|^routed_")
_LETTERS = {"linear_attention": "M", "full_attention": "*", "mlp": "-"}


def dense(hparams: dict[str, Any]) -> dict[str, Any]:
    """A hybrid without experts, in the words of a config.json that never knew of any."""
    kinds = hparams.get("layers_block_type")
    if not kinds or not set(kinds) <= set(_LETTERS):
        return hparams
    kept = {k: v for k, v in hparams.items() if not _OF_EXPERTS.search(k)}
    del kept["layers_block_type"]
    pattern = "".join(_LETTERS[kind] for kind in kinds)
    return {**kept, "hybrid_override_pattern": pattern, "num_hidden_layers": len(kinds)}


def main(root: str, checkpoint: str, outfile: str, outtype: str) -> None:
    sys.path[:0] = [root, str(Path(root) / "gguf-py")]
    import gguf
    from conversion import base

    # Its loader wants merges; this one joins two bytes to a token that there is not.
    add = gguf.SpecialVocab.add_to_gguf

    def with_merges(vocab: Any, *given: Any, **named: Any) -> None:
        vocab.merges = vocab.merges or ["a b"]
        add(vocab, *given, **named)

    gguf.SpecialVocab.add_to_gguf = with_merges
    load = base.ModelBase.load_hparams
    base.ModelBase.load_hparams = staticmethod(lambda *given, **named: dense(load(*given, **named)))
    base.TextModel.get_vocab_base_pre = lambda *_: "gpt-2"
    sys.argv = ["convert", checkpoint, "--outfile", outfile, "--outtype", outtype]
    runpy.run_path(str(Path(root) / "convert_hf_to_gguf.py"), run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])
