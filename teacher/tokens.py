"""Does the trainer's tokenizer mean the same by these ids as the engine's did?

Scoring ids under another vocabulary gives numbers that look like drift. So an id beyond the model's
vocabulary, or one that the two sides spell differently, stops the comparison before it starts.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from driftgate.trace import Reason, Trace

__all__ = ["TokenCheck", "load_tokenizer"]

log = logging.getLogger(__name__)

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
FIX = "give --model the checkpoint that the engine serves, or --served-model to skip other models"


class TokenCheck:
    """Compares traces with one tokenizer; remembers how it spells each id."""

    def __init__(self, tokenizer: Any | None, *, vocab_size: int) -> None:
        """``tokenizer`` None: only the ids' range is checked."""
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._texts: dict[int, str] = {}

    def mismatch(self, trace: Trace) -> Reason | None:
        """Why ``trace`` cannot be this tokenizer's, or None."""
        assert trace.prompt_ids is not None
        assert trace.response_ids is not None
        ids = np.concatenate([trace.prompt_ids, trace.response_ids])
        if ids.min() < 0 or ids.max() >= self._vocab_size:
            beyond = int(ids.min() if ids.min() < 0 else ids.max())
            seen = f"token id {beyond} is outside the trainer's vocabulary of {self._vocab_size}"
            return Reason(code="tokenizer_mismatch", detail=seen, fix=FIX)
        if self._tokenizer is None or trace.token_offsets is None:
            return None
        different = self._different(trace.response_ids.tolist(), trace)
        if not different:
            return None
        index, token, stored, own = different[0]
        seen = (
            f"{len(different)} of {len(trace.response_ids)} response tokens are spelt differently; "
            f"the first, id {token} at {index}, is {stored!r} to the engine and {own!r} here"
        )
        return Reason(code="tokenizer_mismatch", detail=seen, fix=FIX)

    def _different(self, ids: list[int], trace: Trace) -> list[tuple[int, int, str, str]]:
        assert trace.token_offsets is not None
        offsets = trace.token_offsets.tolist()
        different = []
        for index, token in enumerate(ids):
            stored = _whole(trace.token_bytes[offsets[index] : offsets[index + 1]])
            own = self._text(token)
            # Engines join the bytes of a character to its last token, and some tokenizers drop the
            # space in front of a text: neither says anything about the id.
            if not stored or REPLACEMENT in own or stored.lstrip(" ") == own.lstrip(" "):
                continue
            different.append((index, token, stored, own))
        return different

    def _text(self, token: int) -> str:
        text = self._texts.get(token)
        if text is None:
            assert self._tokenizer is not None
            text = self._texts[token] = str(
                self._tokenizer.decode(
                    [token], skip_special_tokens=False, clean_up_tokenization_spaces=False
                )
            )
        return text


def _whole(stored: bytes) -> str:
    """The text of a stored token, or '' where it is not whole characters."""
    try:
        text = stored.decode()
    except UnicodeDecodeError:
        return ""
    return "" if REPLACEMENT in text else text


def load_tokenizer(model_dir: str) -> Any | None:
    """The checkpoint's tokenizer, or None (and a warning) where it has none that loads."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
    except Exception as error:  # the tokenizers library raises nothing more special
        log.warning("no tokenizer in %s, only id ranges are checked: %s", model_dir, error)
        return None
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        # transformers makes an empty one of the model's class where there are no files.
        log.warning("no tokenizer in %s, only id ranges are checked", model_dir)
        return None
    return tokenizer
