"""What each sampled token is: thinking, a tool call, content or a special token; or unknown.

Told from the tokens' own texts by the marks that chat templates put around them, else from the
answer's fields where their text stands in the tokens verbatim. No tokenizer is asked. What cannot
be told is said in words, and a token without a text is ``unknown``, not content.
"""

from __future__ import annotations

import itertools
import re
from typing import Any, Literal, NamedTuple

from driftgate.spoken import message_of
from driftgate.trace import Trace

__all__ = ["CLASSES", "Classified", "TokenClass", "classify"]

TokenClass = Literal["thinking", "tool_call", "content", "special", "unknown"]

CLASSES: tuple[TokenClass, ...] = ("thinking", "tool_call", "content", "special", "unknown")

MARKS: tuple[tuple[TokenClass, bytes, bytes], ...] = (
    ("thinking", b"<think>", b"</think>"),  # Qwen3, DeepSeek, GLM, MiniMax
    ("thinking", b"[THINK]", b"[/THINK]"),  # Magistral
    ("thinking", b"<seed:think>", b"</seed:think>"),  # Seed-OSS
    ("thinking", b"<|channel|>analysis<|message|>", b"<|end|>"),  # gpt-oss
    ("tool_call", b"<tool_call>", b"</tool_call>"),  # Qwen, Hermes, GLM
    ("tool_call", b"<minimax:tool_call>", b"</minimax:tool_call>"),
    ("tool_call", b"<|tool_calls_section_begin|>", b"<|tool_calls_section_end|>"),  # Kimi K2
    ("tool_call", "<｜tool▁calls▁begin｜>".encode(), "<｜tool▁calls▁end｜>".encode()),  # DeepSeek
    ("tool_call", b"<|channel|>commentary to=", b"<|call|>"),  # gpt-oss
    ("tool_call", b"<|python_tag|>", b"<|eom_id|>"),  # Llama 3
    ("tool_call", b"[TOOL_CALLS]", b"</s>"),  # Mistral: to the end of the answer
)
"""(class, what opens it, what closes it), bytes as a template writes them."""

SPECIAL = re.compile(
    rb"<\|[^<>|]{1,64}\|>|<\xef\xbd\x9c.{1,64}\xef\xbd\x9c>|</?s>|</?[a-z_:]*(?:think|tool_call)>"
    rb"|<(?:pad|eos|bos|unk|start_of_turn|end_of_turn)>|\[/?(?:THINK|TOOL_CALLS|INST)\]",
    re.DOTALL,
)
"""A token that is one of these as a whole is a mark, not text."""

UNCLOSED = (
    "reasoning that the template opened in the prompt and that never closed would be counted as "
    "content: the prompt's text is not stored"
)


class Classified(NamedTuple):
    """The classes of one response's tokens."""

    classes: list[TokenClass]
    """[R]"""
    notes: list[str]
    """What cannot be told, in words."""


class _Span(NamedTuple):
    kind: TokenClass
    start: int
    end: int


def classify(trace: Trace) -> Classified:
    """The class of each sampled token of ``trace``, in order."""
    count = 0 if trace.response_ids is None else len(trace.response_ids)
    if trace.token_offsets is None:
        note = "the engine gave no token texts: no class can be told"
        return Classified(["unknown"] * count, [note] if count else [])
    spans, notes = _spans(trace.token_bytes, message_of(trace.response))
    offsets = trace.token_offsets.tolist()
    ended = trace.meta.finish_reason in ("stop", "tool_calls")
    classes = [
        _class(trace.token_bytes[start:end], start, spans, last=ended and j == count - 1)
        for j, (start, end) in enumerate(itertools.pairwise(offsets))
    ]
    return Classified(classes, notes)


def _class(text: bytes, at: int, spans: list[_Span], *, last: bool) -> TokenClass:
    if SPECIAL.fullmatch(text):
        return "special"
    if not text:
        return "special" if last else "unknown"  # the end token, whose text engines cut off
    return next((span.kind for span in spans if span.start <= at < span.end), "content")


def _spans(text: bytes, message: dict[str, Any]) -> tuple[list[_Span], list[str]]:
    """Byte ranges of thinking and of tool calls, thinking first, and what could not be told."""
    found = [span for mark in MARKS for span in _marked(text, *mark)]
    thought = [span for span in found if span.kind == "thinking"]
    # A tool call that is only thought of is thinking, also where its mark never closes.
    marked = thought + [
        span
        for span in found
        if span.kind != "thinking" and not any(t.start <= span.start < t.end for t in thought)
    ]
    notes = []
    reasoning = message.get("reasoning_content") or message.get("reasoning")
    if not any(span.kind == "thinking" for span in marked):
        if not isinstance(reasoning, str) or not reasoning.strip():
            notes.append(UNCLOSED)
        elif (spoken := _verbatim(text, reasoning, "thinking")) is not None:
            marked.append(spoken)
        else:
            notes.append("the answer's reasoning is not in its tokens verbatim: counted as content")
    if not any(span.kind == "tool_call" for span in marked):
        for called in _arguments(message):
            if (spoken := _verbatim(text, called, "tool_call")) is not None:
                marked.append(spoken)
            else:
                notes.append("a tool call is not in the tokens verbatim: counted as content")
    marked.sort(key=lambda span: span.kind != "thinking")
    return marked, notes


def _marked(text: bytes, kind: TokenClass, opens: bytes, closes: bytes) -> list[_Span]:
    """Ranges between marks; what closes without opening was opened by the prompt (thinking only),
    what does not close goes to the end."""
    out, at = [], 0
    first_close, first_open = text.find(closes), text.find(opens)
    pairs = kind == "thinking" and closes not in (b"<|end|>",)
    if pairs and first_close >= 0 and not 0 <= first_open < first_close:
        out.append(_Span(kind, 0, first_close))
        at = first_close + len(closes)
    while (start := text.find(opens, at)) >= 0:
        end = text.find(closes, start)
        end = len(text) if end < 0 else end
        out.append(_Span(kind, start, end))
        at = max(end, start + len(opens))
    return out


def _verbatim(text: bytes, said: str, kind: TokenClass) -> _Span | None:
    needle = said.strip().encode()
    at = text.find(needle)
    return _Span(kind, at, at + len(needle)) if needle and at >= 0 else None


def _arguments(message: dict[str, Any]) -> list[str]:
    """Argument texts of the answer's tool calls."""
    calls = message.get("tool_calls")
    found = [
        call.get("function", {}).get("arguments")
        for call in (calls if isinstance(calls, list) else [])
        if isinstance(call, dict) and isinstance(call.get("function"), dict)
    ]
    return [text for text in found if isinstance(text, str) and text.strip()]
