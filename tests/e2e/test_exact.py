"""Exact-token continuation on real engines: nothing changes where nothing breaks, and what breaks
today does not."""

from __future__ import annotations

import json
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from openai import AsyncOpenAI

from driftgate.gateway.api_tree import read_tree
from driftgate.storage import Reader
from driftgate.terminal import percent
from driftgate.testing.engine import EngineProcess
from driftgate.trace import Trace
from driftgate.tree import Tree
from tests.e2e.support import Proxied, proxy, stored_traces, without_identity
from tests.e2e.test_apis import FUNCTION, by_chat, by_messages, by_responses, same

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

WAYS = ("rendered", "exact")
TOOL = {"type": "function", "function": FUNCTION}
FORCED = {"type": "function", "function": {"name": FUNCTION["name"]}}
SYSTEM = {"role": "system", "content": "You are a guide."}


def whole(chunks: list[Any]) -> dict[str, Any]:
    """A stream of one choice; into how many chunks a busy engine cuts it is no matter."""
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    calls = [c["function"] for one in choices for c in one["delta"].get("tool_calls") or ()]
    return {
        "keys": [sorted(chunks[0]), sorted(chunks[-1])],
        "content": "".join(choice["delta"].get("content") or "" for choice in choices),
        "names": [call["name"] for call in calls if call.get("name")],
        "arguments": "".join(call.get("arguments") or "" for call in calls),
        "finish_reasons": [c["finish_reason"] for c in choices if c["finish_reason"]],
        "usage": chunks[-1].get("usage"),
    }


async def unbroken(proxied: Proxied) -> list[Any]:
    """Every form of an answer, in a run whose history re-tokenises to what was sampled."""
    messages: list[Any] = [SYSTEM]
    answers: list[Any] = []

    async def ask(text: str, **fields: Any) -> Any:
        messages.append({"role": "user", "content": text})
        asked = {"model": proxied.engine.model, "messages": messages, "seed": len(answers)}
        asked |= {"tools": [TOOL], "tool_choice": "none", "max_tokens": 24} | fields
        answer = await proxied.call("run", asked)
        answers.append(whole(answer) if "stream" in fields else without_identity(answer))
        return answer

    def keep(content: str) -> None:
        messages.append({"role": "assistant", "content": content})

    keep((await ask("Where to?"))["choices"][0]["message"]["content"])
    chunks = await ask("And then?", stream=True, stream_options={"include_usage": True})
    keep(whole(chunks)["content"])
    both = await ask("Which one?", n=2, logprobs=True, top_logprobs=2)
    keep(both["choices"][1]["message"]["content"])
    tools = {"tool_choice": FORCED, "max_tokens": 96}
    await ask("How many?", **tools)
    messages.pop()
    await ask("How many?", stream=True, **tools)
    return answers


@pytest.mark.parametrize("kind", ["dense", "moe"])
async def test_with_nothing_broken_both_ways_are_one(
    engines: dict[str, EngineProcess], tmp_path: Path, kind: str
) -> None:
    answers: dict[str, list[Any]] = {}
    for way in WAYS:
        async with proxy(engines[kind], tmp_path / way, continuation=way) as proxied:
            answers[way] = await unbroken(proxied)
    assert answers["exact"] == answers["rendered"]
    rendered, exact = (stored_traces(tmp_path / way, "run") for way in WAYS)
    assert len(exact) == 6
    for a, b in zip(rendered, exact, strict=True):
        assert b.meta.missing == []
        same(a, b)
    assert [how(trace) for trace in rendered] == [None] * 6
    assert [how(trace) for trace in exact] == [None, *["exact"] * 5]


def how(trace: Trace) -> str | None:
    return None if trace.meta.continuation is None else trace.meta.continuation.way


def extends(before: Trace, after: Trace) -> None:
    """The later prompt begins with every token of the call before."""
    assert before.prompt_ids is not None
    assert before.response_ids is not None
    assert after.prompt_ids is not None
    whole = np.concatenate([before.prompt_ids, before.response_ids])
    assert np.array_equal(after.prompt_ids[: len(whole)], whole)


async def forgetful(url: str, model: str, *, tools_too: bool) -> None:
    """An ordinary loop on the SDK. It sends back what the API has room for: no reasoning, and the
    arguments of its tool calls through its own JSON."""
    messages: list[Any] = [SYSTEM]
    async with AsyncOpenAI(base_url=url, api_key="none") as client:
        for turn in range(8):
            messages.append({"role": "user", "content": f"What is next after {turn}?"})
            choice: Any = FORCED if tools_too and turn % 2 else "none"
            tools: dict[str, Any] = {"tools": [TOOL], "tool_choice": choice}
            answer = await client.chat.completions.create(
                model=model, messages=messages, seed=turn, max_tokens=64, **tools
            )
            said = answer.choices[0].message
            kept: dict[str, Any] = {"role": "assistant", "content": said.content}
            calls = [call.model_dump() for call in said.tool_calls or ()]
            for call in calls:
                arguments = json.loads(call["function"]["arguments"])
                call["function"]["arguments"] = json.dumps(arguments, indent=2)
            messages.append(kept | ({"tool_calls": calls} if calls else {}))
            messages += [
                {"role": "tool", "tool_call_id": call["id"], "content": "42"} for call in calls
            ]


def tree_of(store: Path) -> Tree:
    with closing(Reader(store)) as reader:
        return read_tree(reader, "run")


@pytest.mark.parametrize(
    ("kind", "cause"), [("moe", "tool_json_rerendered"), ("thinking", "reasoning_dropped")]
)
async def test_what_breaks_today_extends(
    engines: dict[str, EngineProcess],
    thinking_engine: EngineProcess,
    tmp_path: Path,
    kind: str,
    cause: str,
) -> None:
    engine = thinking_engine if kind == "thinking" else engines[kind]
    for way in WAYS:
        async with proxy(engine, tmp_path / way, continuation=way) as proxied:
            await forgetful(f"{proxied.url}/t/run/v1", engine.model, tools_too=kind == "moe")
    rendered, exact = (tree_of(tmp_path / way) for way in WAYS)
    assert cause in rendered.breaks
    assert exact.kinds == {"root": 1, "extension": 7}
    assert exact.breaks == {}
    traces = stored_traces(tmp_path / "exact", "run")
    for before, after in pairwise(traces):
        extends(before, after)
        assert how(after) == "exact"
        assert after.meta.missing == []
    shares = rendered.tokens.merged_share, exact.tokens.merged_share
    assert shares[0] is not None
    assert shares[1] is not None
    assert shares[1] > shares[0]
    for name, tree in zip(WAYS, (rendered, exact), strict=True):
        tokens = tree.tokens
        print(kind, name, tree.kinds, tree.breaks, tokens, percent(tokens.merged_share))


class Thinker:
    """Turns of one run on an engine with a reasoning parser, asked to end their thoughts."""

    def __init__(self, proxied: Proxied, end_mark: int) -> None:
        self.proxied, self.end_mark = proxied, end_mark

    async def ask(self, messages: list[Any], **fields: Any) -> tuple[str, str]:
        """Reasoning and text of an answer."""
        asked = {"model": self.proxied.engine.model, "messages": messages, "max_tokens": 20}
        asked |= {"logit_bias": {str(self.end_mark): 15}} | fields
        answer = await self.proxied.call("run", asked)
        if not fields.get("stream"):
            message = answer["choices"][0]["message"]
            return message["reasoning"] or "", message["content"] or ""
        deltas = [choice["delta"] for chunk in answer for choice in chunk["choices"]]
        found = ["".join(d.get(name) or "" for d in deltas) for name in ("reasoning", "content")]
        return found[0], found[1]

    async def clean(self, messages: list[Any]) -> str:
        """The text of an answer whose thoughts end once, in its middle."""
        for seed in range(60):
            thought, text = await self.ask(messages, seed=seed)
            ids = self.proxied.traces("run")[-1].response_ids
            assert ids is not None
            if thought and text and ids.tolist().count(self.end_mark) == 1:
                return text
        raise AssertionError("no seed ends its thoughts once")


async def test_a_parser_that_scans_the_prompt_is_not_misled(
    scanning_engine: EngineProcess, tmp_path: Path
) -> None:
    found: dict[str, list[tuple[str, str]]] = {}
    for way in WAYS:
        async with proxy(scanning_engine, tmp_path / way, continuation=way) as proxied:
            body: dict[str, Any] = {"model": scanning_engine.model, "prompt": "</think>"}
            body["add_special_tokens"] = False
            async with proxied.http.post(f"{scanning_engine.url}/tokenize", json=body) as said:
                (end_mark,) = (await said.json())["tokens"]
            thinker = Thinker(proxied, end_mark)
            history = [{"role": "user", "content": "hi"}]
            history.append({"role": "assistant", "content": await thinker.clean(history)})
            history.append({"role": "user", "content": "and then?"})
            grammar: dict[str, Any] = {"structured_outputs": {"choice": ["yes", "no"]}, "seed": 5}
            grammar["logit_bias"] = {str(end_mark): 30}
            found[way] = [
                await thinker.ask(history, seed=5, stream=True),
                await thinker.ask(history, **grammar),
                await thinker.ask(history, **grammar, stream=True),
            ]
            await thinker.clean(history)
    assert found["exact"] == found["rendered"]
    assert not any("</think>" in thought + text for thought, text in found["exact"])
    first, *_ = ways = stored_traces(tmp_path / "exact", "run")
    assert first.meta.continuation is None
    reasons = [t.meta.continuation.reason or "" for t in ways if t.meta.continuation is not None]
    assert sum("a stream's parser" in reason for reason in reasons) == 2
    assert sum("the grammar of structured_outputs" in reason for reason in reasons) == 1
    last = ways[-1]
    assert (how(last), last.meta.missing) == ("exact", [])


async def test_other_apis_extend_as_well(engines: dict[str, EngineProcess], tmp_path: Path) -> None:
    async with proxy(engines["moe"], tmp_path, continuation="exact") as proxied:
        await by_chat(proxied, "chat")
        await by_responses(proxied, "responses", stream=True, named=False)
        await by_responses(proxied, "previous", stream=False, named=True)
        await by_messages(proxied, "messages", stream=True)
    for name in ("chat", "responses", "previous", "messages"):
        traces = proxied.traces(name)
        assert [trace.meta.missing for trace in traces] == [[]] * 3
        for before, after in pairwise(traces):
            assert how(after) == "exact", (name, after.meta.continuation)
            extends(before, after)
