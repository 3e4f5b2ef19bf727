"""Why a prompt does not begin with the tokens of the call that it follows. Pure.

Tokens are a function of the request's messages, tools, model and template settings, so a cause is
found by comparing requests, and only where the tokens part: what differs before that place had no
effect on them, what differs behind it would have broken the prefix later. Where nothing differs in
what was asked, the template or the tokenizer renders an answer with other tokens than were sampled.
What neither explains is ``unknown_break``, with the texts on both sides.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import NamedTuple

import msgspec
import numpy as np

from driftgate.dialogue import Dialogue, Said, dialogue_of, read_answer
from driftgate.trace import I32, Reason, Trace

__all__ = ["BREAKS", "Broken", "Parted", "break_reason", "why_broken"]

EXCERPT_TOKENS = 12
"""Shown on each side of the place where two prompts part: half a line."""

EXCERPT_CHARS = 60
"""Of a message or a line in a reason."""

GENERATION_TOKENS = 16
"""What templates put between the last message and the answer is shorter: ``<|im_start|>assistant``,
``<think>`` and blanks."""

THOUGHT_END = b"</think>"

MAX_REASONS = 4
"""The cause, and what else differs behind it."""

BREAKS: dict[str, tuple[str, str]] = {
    "model_changed": (
        "The two calls name different models.",
        "keep one model for a run, or expect a sequence of its own for each",
    ),
    "system_changed": (
        "The system message is another one.",
        "keep it the same for the whole run: put what changes into the last user message",
    ),
    "tools_changed": (
        "The set of tools, their order or a schema changed, and templates render it at the start.",
        "offer the same tools in the same order in every call of a run",
    ),
    "reasoning_dropped": (
        "The reasoning of an earlier answer is not in the prompt any more.",
        "send `reasoning` back with each assistant message and use a template that keeps it, or "
        "serve with `--continuation exact`; otherwise each such turn is trained as a sequence of "
        "its own",
    ),
    "tool_json_rerendered": (
        "A tool call came back as the same JSON in another spelling.",
        "serve with `--continuation exact`; or send the arguments back as the string that came, "
        "and use a template that renders strings as they are",
    ),
    "answer_extended": (
        "An answer that was cut at max_tokens came back longer than it was sampled.",
        "raise max_tokens, or send the cut answer back as it came",
    ),
    "history_edited": (
        "An earlier message was changed, removed or put in.",
        "append to the history and leave what was sent as it is; where it must be cut, start a new "
        "sequence on purpose",
    ),
    "retokenised": (
        "The same text was split into other tokens than were sampled.",
        "serve with `--continuation exact`, or send token ids (`/v1/completions` with "
        "`return_token_ids`) instead of text",
    ),
    "template_differs": (
        "The same messages were rendered with other tokens.",
        "compare the template's rendering of a past answer with what is sampled: end tokens, "
        "blanks, generation prompt; use one that renders history as it was generated, or serve "
        "with `--continuation exact`",
    ),
    "unknown_break": (
        "The prompts part, and the requests do not say why.",
        "look at the texts on both sides",
    ),
}
"""Meaning and fix of every code."""

_DATE = re.compile(r"\d{4}-\d\d-\d\d|\d{1,2}:\d\d|\b(?:19|20)\d\d\b")
_BILLING = "x-anthropic-billing-header"


class Broken(msgspec.Struct, frozen=True, kw_only=True):
    """A prefix that broke."""

    position: int
    """First token that differs, from 0."""
    of: int
    """Tokens of the call that it follows, prompt and answer: all of them were to be repeated."""
    was: str
    """Text from ``position`` on in that call; ``⟨id⟩`` for a token whose text nobody told us."""
    now: str
    """Text from ``position`` on in this prompt."""
    reasons: list[Reason]
    """The cause, then what else differs behind that place."""


class Parted(NamedTuple):
    """Two calls and the place where their tokens part."""

    last: Trace
    """The call whose conversation is continued."""
    at: Trace
    """The call on the line of ``last`` that brought the token at ``position``, in its prompt or its
    answer; ``last`` itself where nothing before is known."""
    before: Trace | None
    """The one before ``at`` on that line."""
    now: Trace
    position: int


class _Change(NamedTuple):
    """A difference between two requests."""

    message: int
    """Its index; -1 for what stands before all messages."""
    reason: Reason


def break_reason(code: str, detail: str) -> Reason:
    """A reason of `BREAKS`."""
    return Reason(code=code, detail=detail, fix=BREAKS[code][1])


def why_broken(parted: Parted, texts: Mapping[int, bytes]) -> Broken:
    """The cause of a break. ``texts``: of the tokens that are known, by id."""
    was, now = _ids(parted.last), _prompt(parted.now)
    return Broken(
        position=parted.position,
        of=len(was),
        was=_excerpt(was[parted.position :], texts),
        now=_excerpt(now[parted.position :], texts),
        reasons=_reasons(parted, texts),
    )


def _reasons(parted: Parted, texts: Mapping[int, bytes]) -> list[Reason]:
    old, new, at = map(dialogue_of, (parted.last, parted.now, parted.at))
    if old is None or new is None or at is None:
        return [break_reason("unknown_break", "one of the requests holds no whole conversation")]
    turn = len(at.messages)
    first = _first_message(parted)
    changes = [*_head_changes(old, new), *_message_changes(parted.last, old, new)]
    if parted.position >= len(_prompt(parted.at)):
        said = read_answer(parted.at.response)
        back = new.messages[turn] if turn < len(new.messages) else None
        own = _answer_change(parted, said, back, turn, texts)
        behind = [c.reason for c in changes if c.message > turn]
        settings = [c.reason for c in changes if c.reason.code == "template_differs"]
        found = [*settings, own] if own.code == "template_differs" else [own, *settings]
        return _distinct([*found, *behind])
    scoped = sorted((c for c in changes if c.message >= first or c.message < 0), key=_order(first))
    behind = [c.reason for c in scoped]
    if not _explains(scoped, turn):
        behind.insert(0, _rendering_change(parted, turn))
    return _distinct(behind)


def _order(first: int) -> Callable[[_Change], tuple[int, int]]:
    """What is rendered first comes first: the system message, tools, then message by message.

    Behind the beginning only messages can be the cause, unless a template puts tools at the end.
    Another model is named where nothing else explains the place."""
    ranks = {"system_changed": 0, "tools_changed": 1 if first < 0 else 3, "template_differs": 4}

    def rank(change: _Change) -> tuple[int, int]:
        head = change.message < 0 or change.reason.code == "system_changed"
        if head:
            return ranks.get(change.reason.code, 5), change.message
        return 2, change.message

    return rank


def _first_message(parted: Parted) -> int:
    """The first message that ``at`` brought; -1 where it brought the beginning as well."""
    before = dialogue_of(parted.before) if parted.before is not None else None
    return -1 if before is None else len(before.messages) + 1


def _explains(scoped: Sequence[_Change], turn: int) -> bool:
    """Some change stands where the tokens part, or may be rendered there."""
    return any(change.message <= turn for change in scoped)


def _rendering_change(parted: Parted, turn: int) -> Reason:
    """Nothing that was asked differs where the prompts part."""
    said = read_answer(parted.at.response)
    near_end = parted.position >= len(_prompt(parted.at)) - GENERATION_TOKENS
    if said is not None and said.reasoning and near_end:
        return _by_template(turn)
    return break_reason(
        "template_differs",
        f"the messages before the answer of step {parted.at.meta.step} are the same, and yet "
        f"token {parted.position} differs",
    )


def _by_template(index: int) -> Reason:
    return break_reason(
        "reasoning_dropped",
        f"message {index} still has its reasoning, and the chat template leaves it out",
    )


def _head_changes(old: Dialogue, new: Dialogue) -> Iterator[_Change]:
    if old.model != new.model:
        detail = f"the model was {old.model!r} and is {new.model!r}"
        yield _Change(-1, break_reason("model_changed", detail))
    for key in sorted(old.template.keys() | new.template.keys()):
        if old.template.get(key) != new.template.get(key):
            detail = f"`{key}` was {old.template.get(key)} and is {new.template.get(key)}"
            yield _Change(-1, break_reason("template_differs", detail))
    if list(old.tools.items()) != list(new.tools.items()):
        yield _Change(-1, break_reason("tools_changed", _tools_detail(old.tools, new.tools)))


def _tools_detail(old: Mapping[str, str], new: Mapping[str, str]) -> str:
    parts = {
        "added": [name for name in new if name not in old],
        "removed": [name for name in old if name not in new],
        "other schema": [name for name in new if name in old and new[name] != old[name]],
    }
    said = [f"{what}: {', '.join(names)}" for what, names in parts.items() if names]
    return "; ".join(said) or "the same tools in another order"


def _message_changes(last: Trace, old: Dialogue, new: Dialogue) -> Iterator[_Change]:
    """Message by message up to the first that has no counterpart."""
    answer = read_answer(last.response)
    expected = old.messages if answer is None else (*old.messages, answer)
    for index, (was, now) in enumerate(zip_longest(expected, new.messages)):
        if was is None:
            return
        if now is None or was.role != now.role:
            there = "nothing" if now is None else f"a message of {now.role}"
            detail = f"message {index} ({was.role}) is gone; in its place stands {there}"
            yield _Change(index, break_reason("history_edited", detail))
            return
        cut = index == len(old.messages) and last.meta.finish_reason == "length"
        if (reason := _changed(was, now, index, cut=cut)) is not None:
            yield _Change(index, reason)


def _changed(was: Said, now: Said, index: int, *, cut: bool) -> Reason | None:
    """What became of one message; ``cut``: it is an answer that ended at max_tokens."""
    if was == now:
        return None
    if was.role in ("system", "developer") and was.text != now.text:
        return _system_change(was.text, now.text)
    if was.reasoning and not now.reasoning:
        detail = f"message {index} came back without its reasoning ({len(was.reasoning)} chars)"
        return break_reason("reasoning_dropped", detail)
    if was.text != now.text:
        if cut and was.text and now.text.startswith(was.text):
            more = len(now.text) - len(was.text)
            detail = f"message {index} was cut at max_tokens and came back {more} chars longer"
            return break_reason("answer_extended", detail)
        return break_reason("history_edited", f"message {index} ({was.role}) {_edit(was, now)}")
    if was.calls != now.calls:
        if was.key == now.key:
            one, other = next((a, b) for a, b in zip(was.calls, now.calls, strict=True) if a != b)
            detail = f"message {index}: {_short(one.arguments)} became {_short(other.arguments)}"
            return break_reason("tool_json_rerendered", detail)
        return break_reason("history_edited", f"the tool calls of message {index} changed")
    if was.reasoning != now.reasoning:
        return break_reason("history_edited", f"the reasoning of message {index} changed")
    return None  # what is left (ids of tool calls) templates hardly ever render


def _edit(was: Said, now: Said) -> str:
    if was.text.strip() == now.text.strip():
        return "came back without, or with other, blanks around its text"
    common = next(
        (i for i, (a, b) in enumerate(zip(was.text, now.text, strict=False)) if a != b),
        min(len(was.text), len(now.text)),
    )
    start = max(0, common - EXCERPT_CHARS // 3)
    return f"was {_short(was.text[start:])} and is {_short(now.text[start:])}"


def _system_change(was: str, now: str) -> Reason:
    pairs = zip_longest(was.splitlines(), now.splitlines(), fillvalue="")
    old, new = next(((a, b) for a, b in pairs if a != b), (was, now))
    reason = break_reason("system_changed", f"a line was {_short(old)} and is {_short(new)}")
    fix = None
    if _BILLING in old + new:
        fix = "set CLAUDE_CODE_ATTRIBUTION_HEADER=0, so that Claude Code leaves that line out"
    elif _DATE.sub("", old) == _DATE.sub("", new):
        fix = "take the date or time out of the system message, or fix it for the run"
    return reason if fix is None else msgspec.structs.replace(reason, fix=fix)


def _answer_change(
    parted: Parted, said: Said | None, back: Said | None, turn: int, texts: Mapping[int, bytes]
) -> Reason:
    """What became of the answer of ``at``, in which the prompts part."""
    step = parted.at.meta.step
    if said is None or back is None or back.role != "assistant":
        detail = f"the answer of step {step} is not among the messages any more"
        return break_reason("history_edited", detail)
    cut = parted.at.meta.finish_reason == "length"
    if (reason := _changed(said, back, turn, cut=cut)) is not None:
        return reason
    sampled, offset = _sampled(parted)
    if offset is not None:
        if offset < _thought_end(sampled):
            return _by_template(turn)
        if said.calls and offset >= _calls_start(sampled, said):
            detail = (
                f"the tool call of step {step} was sampled as "
                f"{_short(sampled[_calls_start(sampled, said) :].decode(errors='replace'))} "
                "and rendered again with other tokens"
            )
            return break_reason("tool_json_rerendered", detail)
    if _same_text(parted, texts):
        detail = f"the answer of step {step} came back as the same text in other tokens"
        return break_reason("retokenised", detail)
    detail = f"the answer of step {step} came back unchanged and was rendered with other tokens"
    return break_reason("template_differs", detail)


def _sampled(parted: Parted) -> tuple[bytes, int | None]:
    """The answer's text as sampled, and where in it the prompts part."""
    offsets = parted.at.token_offsets
    index = parted.position - len(_prompt(parted.at))
    if offsets is None or not 0 <= index < len(offsets):
        return b"", None
    return parted.at.token_bytes, int(offsets[index])


def _thought_end(sampled: bytes) -> int:
    """Where the text begins; 0 without reasoning."""
    return sampled.find(THOUGHT_END) + len(THOUGHT_END) if THOUGHT_END in sampled else 0


def _calls_start(sampled: bytes, said: Said) -> int:
    """Where the tool calls begin in what was sampled: behind reasoning and text."""
    start = _thought_end(sampled)
    text = said.text.strip().encode(errors="surrogatepass")
    found = sampled.find(text, start) if text else start
    return start if found < 0 else found + len(text)


def _same_text(parted: Parted, texts: Mapping[int, bytes]) -> bool:
    """The tokens on both sides spell the same, as far as both can be read."""
    was = _spelled(_ids(parted.last)[parted.position :], texts)
    now = _spelled(_prompt(parted.now)[parted.position :], texts)
    size = min(len(was), len(now))
    return size > 0 and was[:size] == now[:size]


def _spelled(ids: I32, texts: Mapping[int, bytes]) -> bytes:
    """Up to the first token whose text is not known."""
    found = []
    for token in ids[:EXCERPT_TOKENS].tolist():
        if token not in texts:
            break
        found.append(texts[token])
    return b"".join(found)


def _excerpt(ids: I32, texts: Mapping[int, bytes]) -> str:
    tokens = ids[:EXCERPT_TOKENS].tolist()
    parts = [texts.get(token, f"⟨{token}⟩".encode()) for token in tokens]
    return b"".join(parts).decode(errors="replace")


def _short(text: str) -> str:
    """One line, cut, as a JSON string."""
    cut = text if len(text) <= EXCERPT_CHARS else text[: EXCERPT_CHARS - 1] + "…"
    return msgspec.json.encode(cut).decode()


def _distinct(reasons: Sequence[Reason]) -> list[Reason]:
    by_code: dict[str, Reason] = {}
    for reason in reasons:
        by_code.setdefault(reason.code, reason)
    return list(by_code.values())[:MAX_REASONS]


def _prompt(trace: Trace) -> I32:
    return np.zeros(0, np.int32) if trace.prompt_ids is None else trace.prompt_ids


def _ids(trace: Trace) -> I32:
    response = np.zeros(0, np.int32) if trace.response_ids is None else trace.response_ids
    return np.concatenate([_prompt(trace), response])
