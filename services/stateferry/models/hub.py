"""Models by their Hugging Face hub id, where the network has the hub.

Without torch: routers need the configuration and the tokenizer.
"""

from __future__ import annotations

import re
from pathlib import Path

from stateferry.core.errors import ModelError

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(@\w[\w.-]*)?")
# Configuration, tokenizer and weights; no pickle and no code. Not the same weights once more in
# another program's layout, nor what lies in folders.
_WANTED = ["*.json", "*.safetensors"]
_UNWANTED = ["*/*", "consolidated*"]


def is_hub_id(name: str) -> bool:
    """Whether ``name`` reads ``owner/model`` or ``owner/model@revision``, and no such path exists
    here."""
    return _HUB_ID.fullmatch(name) is not None and not Path(name).expanduser().exists()


def hub_directory(hub_id: str) -> Path:
    """Where the model's files are on this machine, fetched first if need be.

    Raises ModelError when huggingface_hub is not installed, or the hub does not give the files.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ModelError(
            f"{hub_id} is no directory; as a Hugging Face hub id it needs huggingface_hub, "
            "which the extra stateferry[hub] installs"
        ) from error
    repository, _, revision = hub_id.partition("@")
    try:
        folder = snapshot_download(
            repository,
            revision=revision or None,
            allow_patterns=_WANTED,
            ignore_patterns=_UNWANTED,
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"{hub_id}: the Hugging Face hub gives no such model: {error}") from error
    return Path(folder)
