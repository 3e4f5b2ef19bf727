"""Token texts as engines report them, and whether they add up to the text that was sent. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise

from driftgate.trace import I32

__all__ = ["place_of", "says_bytes", "text_matches", "token_texts"]

_PLACEHOLDER = "token_id:"
"""vLLM names tokens ``token_id:N`` under ``return_tokens_as_token_ids``: that is no text."""

_NAMELESS = ("\ufffd", _PLACEHOLDER)
"""In the text of a token that does not say its bytes: only their list does."""


def says_bytes(texts: str) -> bool:
    """Whether the UTF-8 of token texts, joined, is their bytes."""
    return not any(nameless in texts for nameless in _NAMELESS)


def token_texts(rows: Iterable[tuple[str, list[int] | None]]) -> list[bytes | None]:
    """Each token's bytes from (token, bytes) rows; None where only a placeholder came.

    The bytes win over the token's text: in chat answers vLLM keeps them true when it names tokens
    by id.
    """
    return [
        token.encode(errors="surrogatepass")
        if values is None and not token.startswith(_PLACEHOLDER)
        else _text(token, values)
        for token, values in rows
    ]


def _text(token: str, values: list[int] | None) -> bytes | None:
    if values is None:
        return None
    try:
        text = bytes(values)
    except ValueError:
        return None
    named_only = token.startswith(_PLACEHOLDER) and text == token.encode()
    return None if named_only else text


def text_matches(joined: bytes, offsets: I32, sent: bytes, *, stopped: bool) -> bool | None:
    """Do the tokens' texts, ``joined`` and cut at ``offsets`` [tokens + 1], give the text that was
    sent?

    ``stopped``: a stop token or stop string ended it, whose text the engine cuts off. None where
    the sent text is the tokens' with whole tokens left out: special tokens are skipped by default,
    and which tokens are special is not known here."""
    if joined == sent or (stopped and joined.startswith(sent)):
        return True
    at = 0
    for start, end in pairwise(offsets.tolist()):
        text = joined[start:end]
        rest = len(sent) - at
        if text and sent.startswith(text, at):
            at += len(text)
        elif stopped and rest < len(text) and text.startswith(sent[at:]):
            at = len(sent)  # the stop string begins inside this token
    return None if at == len(sent) else False


def place_of(tokens: Sequence[bytes | None], text: bytes) -> slice | None:
    """The tokens that spell ``text``, from the first of their bytes to the last; None where there
    are none, or where several places read the same."""
    if not text or None in tokens:
        return None
    joined = b"".join(filter(None, tokens))
    starts = [0, *accumulate(len(token or b"") for token in tokens)]
    ends = {offset: number for number, offset in reversed([*enumerate(starts)])}
    found = {
        start: number
        for number, start in enumerate(starts)
        if start + len(text) in ends and joined.startswith(text, start)
    }
    if len(found) != 1:
        return None
    ((start, number),) = found.items()
    return slice(number, ends[start + len(text)])
