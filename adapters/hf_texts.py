"""Digests of what turns messages into token ids: a checkpoint's tokenizer and its chat template.

Two sides with one tokenizer digest number tokens alike; with one template digest they render one
conversation alike. Over the files as they are, so that engine and trainer need no library in
common, and no torch.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

__all__ = ["text_digests"]

MAX_FILE_BYTES = 256 << 20
"""The largest tokenizers have 40 MB; what is longer is no tokenizer."""

SETTINGS = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"
"""transformers 5 writes the template here, 4 into ``tokenizer_config.json``."""

MODEL_PARTS = ("model", "added_tokens", "normalizer", "pre_tokenizer")
"""Of ``tokenizer.json``: what decides which ids a text gets. Versions rewrite the others."""


def text_digests(model_dir: Path | str) -> dict[str, str]:
    """``tokenizer`` and ``chat_template``: 16 hex digits each, as the settings of a fingerprint.

    A key is absent where the checkpoint has no such file, or none that can be read.
    """
    root = Path(model_dir)
    found = {
        "tokenizer": _tokenizer(_read(root / "tokenizer.json")),
        "chat_template": _template(_read(root / TEMPLATE), _read(root / SETTINGS)),
    }
    return {name: digest for name, digest in found.items() if digest is not None}


def _read(path: Path) -> bytes | None:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            return None
        return path.read_bytes()
    except OSError:
        return None


def _tokenizer(data: bytes | None) -> str | None:
    said = _object(data)
    if not isinstance(said.get("model"), dict):
        return None
    return _digest({part: said.get(part) for part in MODEL_PARTS})


def _template(file: bytes | None, settings: bytes | None) -> str | None:
    if file is not None:
        return _digest(file.decode(errors="replace"))
    said = _object(settings).get("chat_template")
    if isinstance(said, list):  # several by name: the one that chats use
        named = {one.get("name"): one.get("template") for one in said if isinstance(one, dict)}
        said = named.get("default")
    return _digest(said) if isinstance(said, str) else None


def _object(data: bytes | None) -> dict[str, Any]:
    try:
        said = json.loads(data or b"null")
    except (ValueError, RecursionError):
        return {}
    return said if isinstance(said, dict) else {}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
