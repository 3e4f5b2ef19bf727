"""Exact-token continuation: prompts begin with what was sampled, unless the agent edited it."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import TYPE_CHECKING, Any

import pytest
from msgspec import Raw

from driftgate.adapters.vllm import Vllm
from driftgate.gateway import health
from driftgate.gateway.exact import ANOTHER, Exact
from driftgate.gateway.misled import misled
from driftgate.gateway.openai import Plan
from driftgate.trace import Trace
from tests.gateway.conftest import END, standing_in
from tests.gateway.test_upstream import until

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.gateway.conftest import Agent, StandIn

RUN = "/t/run/v1/chat/completions"
HELLO: dict[str, Any] = {"role": "user", "content": "hi"}
NEXT: dict[str, Any] = {"role": "user", "content": "and then?"}


def ids(trace: Trace) -> list[int]:
    assert trace.prompt_ids is not None
    assert trace.response_ids is not None
    return [*trace.prompt_ids.tolist(), *trace.response_ids.tolist()]


def prompt(trace: Trace) -> list[int]:
    assert trace.prompt_ids is not None
    return [*trace.prompt_ids.tolist()]


class Talk:
    """A run that sends back what it gets."""

    def __init__(self, agent: Agent) -> None:
        self.agent = agent
        self.messages: list[dict[str, Any]] = [HELLO]

    async def ask(self, path: str = RUN, **fields: Any) -> dict[str, Any]:
        body = {"model": "tiny", "messages": self.messages, "seed": len(self.messages), **fields}
        status, raw = await self.agent.send(body, path=path)
        assert status == 200, raw
        if fields.get("stream"):
            texts = [
                json.loads(e[6:]) for e in raw.decode().split("\n\n") if e.startswith("data: {")
            ]
            said = "".join(t["choices"][0]["delta"].get("content", "") for t in texts)
            message = {"role": "assistant", "content": said}
        else:
            message = json.loads(raw)["choices"][0]["message"]
        self.messages = [*self.messages, message, NEXT]
        return message


@pytest.fixture
async def talk(connect: Callable[..., Any], engine: StandIn) -> Talk:
    engine.retokenises = True
    return Talk(await connect(continuation="exact"))


@pytest.mark.parametrize("ends", [True, False])
@pytest.mark.parametrize("fields", [{}, {"stream": True}, {"tools": [{"type": "function"}]}])
async def test_each_prompt_begins_with_all_that_was_sampled(
    talk: Talk, engine: StandIn, fields: dict[str, Any], ends: bool
) -> None:
    engine.ends = ends or "tools" in fields
    for _ in range(3):
        await talk.ask(**fields)
    first, second, third = await talk.agent.traces()
    assert first.meta.continuation is None
    for before, after in ((first, second), (second, third)):
        assert prompt(after)[: len(ids(before))] == ids(before)
        assert after.meta.prefix_exact
        assert after.meta.continuation is not None
        assert after.meta.continuation.way == "exact"
        assert after.meta.continuation.after == before.meta.trace_id
        assert after.meta.continuation.kept == len(ids(before))


@pytest.mark.parametrize("ends", [True, False])
async def test_behind_the_sampled_ids_stands_what_the_engine_renders(
    talk: Talk, engine: StandIn, ends: bool
) -> None:
    engine.ends = ends
    await talk.ask()
    await talk.ask()
    first, second = await talk.agent.traces()
    following = [ord("u"), *NEXT["content"].encode(), END, ord("a")]
    assert prompt(second) == [*ids(first), *([] if ends else [END]), *following]


async def test_a_tool_call_that_was_cut_goes_the_ordinary_way(talk: Talk) -> None:
    for _ in range(2):
        await talk.ask(tools=[{"type": "function"}])
    _, second = await talk.agent.traces()
    assert second.meta.continuation is not None
    assert second.meta.continuation.way == "ordinary"
    assert (second.meta.continuation.reason or "").startswith("a tool call was cut")


async def test_off_by_default(connect: Callable[..., Any], engine: StandIn) -> None:
    engine.retokenises = True
    talk = Talk(await connect())
    await talk.ask()
    await talk.ask()
    _, second = await talk.agent.traces()
    assert second.meta.continuation is None
    assert not second.meta.prefix_exact
    assert engine.rendered == 0


def cut(message: dict[str, Any]) -> dict[str, Any]:
    return message | {"content": message["content"].strip()[1:]}


def think(message: dict[str, Any]) -> dict[str, Any]:
    return message | {"reasoning": "I never thought so."}


def name(message: dict[str, Any]) -> dict[str, Any]:
    return message | {"name": "somebody"}


@pytest.mark.parametrize(
    ("edit", "why"),
    [
        (cut, "message 1: not an answer of this run as it was given"),
        (name, "message 1: not an answer of this run as it was given"),
        (think, "message 1: its reasoning, or one before, came back changed"),
    ],
)
async def test_words_that_the_agent_took_out_are_not_put_back(
    talk: Talk, edit: Callable[[dict[str, Any]], dict[str, Any]], why: str
) -> None:
    await talk.ask()
    talk.messages[1] = edit(talk.messages[1])
    await talk.ask()
    _, second = await talk.agent.traces()
    assert prompt(second) == talk.agent.engine.render(talk.messages[:3])
    assert second.meta.continuation is not None
    assert second.meta.continuation.way == "ordinary"
    assert (second.meta.continuation.reason or "").startswith(why)


async def test_before_an_edited_answer_the_exact_ones_are_kept(talk: Talk) -> None:
    await talk.ask()
    await talk.ask()
    talk.messages[3] = cut(talk.messages[3])
    await talk.ask()
    first, _, third = await talk.agent.traces()
    assert prompt(third)[: len(ids(first))] == ids(first)
    assert third.meta.continuation is not None
    assert third.meta.continuation.after == first.meta.trace_id
    assert (third.meta.continuation.reason or "").startswith("message 3: not an answer")


@pytest.mark.parametrize(
    "before", [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "no"}]
)
async def test_an_edit_before_an_answer_counts_as_well(talk: Talk, before: dict[str, Any]) -> None:
    await talk.ask()
    talk.messages = [before, *talk.messages]
    await talk.ask()
    _, second = await talk.agent.traces()
    assert second.meta.continuation is not None
    assert second.meta.continuation.way == "ordinary"


@pytest.mark.parametrize(
    ("field", "value"),
    [("tools", [{"type": "function"}]), ("chat_template_kwargs", {"x": 1}), ("unheard_of", 1)],
)
async def test_what_a_template_may_show_must_be_the_same(
    talk: Talk, field: str, value: Any
) -> None:
    await talk.ask()
    await talk.ask(**{field: value})
    _, second = await talk.agent.traces()
    assert second.meta.continuation is not None
    assert second.meta.continuation.way == "ordinary"


async def test_sampling_and_the_choice_of_a_tool_may_change(talk: Talk) -> None:
    await talk.ask(tool_choice="none")
    await talk.ask(temperature=0.5, max_tokens=3, tool_choice="auto", user="me")
    first, second = await talk.agent.traces()
    assert prompt(second)[: len(ids(first))] == ids(first)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"continue_final_message": True}, "continue_final_message cannot be served"),
        ({"max_tokens": 4090}, "exact tokens and 4090 to sample are over the model's 4096"),
        ({"kv_transfer_params": {"x": 1}}, "kv_transfer_params cannot be served"),
    ],
)
async def test_what_ids_cannot_serve_goes_the_ordinary_way(
    talk: Talk, fields: dict[str, Any], why: str
) -> None:
    await talk.ask()
    await talk.ask(**fields)
    _, second = await talk.agent.traces()
    assert second.meta.continuation is not None
    assert second.meta.continuation.way == "ordinary"
    assert why in (second.meta.continuation.reason or "")


async def test_what_is_not_captured_is_sent_as_it_came(talk: Talk, engine: StandIn) -> None:
    await talk.ask()
    body = {"model": "tiny", "messages": talk.messages, "top_logprobs": 2}
    direct, ours = await talk.agent.both(body)
    assert ours == direct
    assert "kv_transfer_params" not in engine.asked


async def test_images_go_the_ordinary_way(talk: Talk) -> None:
    await talk.ask()
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    talk.messages[-1] = {"role": "user", "content": [image]}
    await talk.ask()
    _, second = await talk.agent.traces()
    assert second.meta.continuation is not None
    assert second.meta.continuation.reason == "the messages hold more than text"


@pytest.mark.parametrize("calls", ["x", 7, [1], [{"function": "x"}], {"function": 1}])
async def test_tool_calls_that_are_none_are_the_engines_to_refuse(talk: Talk, calls: Any) -> None:
    await talk.ask()
    talk.messages[1] = talk.messages[1] | {"tool_calls": calls}
    await talk.ask()
    _, second = await talk.agent.traces()
    assert second.meta.continuation is not None
    assert second.meta.continuation.way == "ordinary"


@pytest.mark.parametrize("message", ['"text"', "7", '{"content": 7, "tool_calls": "x"}', "null"])
async def test_an_answer_without_a_message_costs_no_call(
    talk: Talk, engine: StandIn, message: str
) -> None:
    answer = engine.chat_answer

    def odd(body: dict[str, Any]) -> bytes:
        fields = json.loads(answer(body))
        fields["choices"][0]["message"] = json.loads(message)
        return json.dumps(fields, separators=(",", ":")).encode()

    engine.chat_answer = odd  # type: ignore[method-assign]
    body = {"model": "tiny", "messages": [HELLO]}
    assert (await talk.agent.send(body, path=RUN))[0] == 200


@pytest.mark.parametrize("odd_ids", ["[ ]", "[]", "17", "[[7],[9]]"])
@pytest.mark.parametrize("name", ["prompt_token_ids", "token_ids"])
async def test_ids_that_are_none_are_never_put_into_a_prompt(
    talk: Talk, engine: StandIn, name: str, odd_ids: str
) -> None:
    answer = engine.chat_answer

    def odd(body: dict[str, Any]) -> bytes:
        fields = json.loads(answer(body))
        owner = fields if name in fields else fields["choices"][0]
        owner[name] = "HERE"
        return json.dumps(fields).replace('"HERE"', odd_ids).encode()

    engine.chat_answer = odd  # type: ignore[method-assign]
    await talk.ask()
    await talk.ask()
    assert "kv_transfer_params" not in engine.asked


async def test_a_rendering_that_fails_is_recorded_and_costs_no_call(
    talk: Talk, engine: StandIn
) -> None:
    await talk.ask()
    engine.render_status = 500
    await talk.ask()
    _, second = await talk.agent.traces()
    assert second.meta.status == "complete"
    assert second.meta.continuation is not None
    assert second.meta.continuation.way == "ordinary"
    assert second.meta.continuation.reason == "rendering failed: the engine answered 500"


async def test_an_engine_that_takes_no_ids_is_found_out_by_its_answer(
    talk: Talk, engine: StandIn
) -> None:
    engine.takes_ids = False
    for _ in range(3):
        await talk.ask()
        await talk.agent.flush()  # it is found out when the answer is folded
    _, second, third = await talk.agent.traces()
    for trace in (second, third):
        assert trace.meta.continuation is not None
        assert trace.meta.continuation.way == "ordinary"
        assert "did not take the ids" in (trace.meta.continuation.reason or "")
    assert engine.rendered == 3, "it is not asked again"


async def test_an_engines_error_passes(talk: Talk, engine: StandIn) -> None:
    await talk.ask()
    engine.status = 418
    status, body = await talk.agent.send({"model": "tiny", "messages": talk.messages}, path=RUN)
    assert status == 418
    assert b"the stand-in was told so" in body


async def test_samples_that_read_the_same_are_not_told_apart_by_guessing(
    talk: Talk, engine: StandIn
) -> None:
    def sample(body: Any, choice: int) -> tuple[list[int], list[str], list[float]]:
        return [7 + choice, 9], ["x", "yz"], [-1.0, -1.0]

    engine.sample = sample  # type: ignore[method-assign]
    await talk.ask(n=2)
    await talk.ask()
    *_, last = await talk.agent.traces()
    assert last.meta.continuation is not None
    assert last.meta.continuation.way == "ordinary"
    assert last.meta.continuation.reason == "message 1: 2 samples of this run read the same"


async def test_another_run_with_the_same_words_keeps_its_own_ids(talk: Talk) -> None:
    await talk.ask()
    await talk.ask(path="/t/other/v1/chat/completions")
    *_, second = await talk.agent.traces()
    assert second.meta.continuation is not None
    assert second.meta.continuation.way == "ordinary"


async def test_a_run_goes_on_exactly_after_a_restart(
    connect: Callable[..., Any], engine: StandIn
) -> None:
    engine.retokenises = True
    talk = Talk(await connect(continuation="exact"))
    await talk.ask()
    await talk.agent.flush()
    talk.agent = await connect(continuation="exact", port=0)
    await talk.ask()
    first, second = await talk.agent.traces()
    assert prompt(second)[: len(ids(first))] == ids(first)


async def test_a_call_that_leaves_while_the_store_is_read_takes_no_ids_along(
    connect: Callable[..., Any], engine: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.retokenises = True
    talk = Talk(await connect(continuation="exact"))
    await talk.ask()
    await talk.agent.flush()
    talk.agent = await connect(continuation="exact", port=0)
    reading, may_read, read = asyncio.Event(), threading.Event(), Exact._read
    loop = asyncio.get_running_loop()

    def slow(self: Exact, trajectory: str) -> list[Trace]:
        loop.call_soon_threadsafe(reading.set)
        may_read.wait(10)
        return read(self, trajectory)

    monkeypatch.setattr(Exact, "_read", slow)
    leaving = asyncio.create_task(talk.ask(seed=99))
    await reading.wait()
    leaving.cancel()
    await asyncio.wait({leaving})
    may_read.set()
    await talk.ask()
    *_, last = await talk.agent.traces()
    assert last.meta.continuation is not None
    assert last.meta.continuation.way == "exact"


# Reasoning in the kept ids, which an engine's parsers may take for this answer's.


@pytest.fixture
def thinks(engine: StandIn, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """Its JSON answers have reasoning, in a field of its own."""
    answer = engine.chat_answer

    def thought(body: dict[str, Any]) -> bytes:
        return answer(body).replace(b'"reasoning":null', b'"reasoning":"hm"')

    monkeypatch.setattr(engine, "chat_answer", thought)
    return engine


def way(trace: Trace) -> tuple[str, str]:
    assert trace.meta.continuation is not None
    return trace.meta.continuation.way, trace.meta.continuation.reason or ""


async def forget_and_ask(talk: Talk, **fields: Any) -> tuple[str, str]:
    """A second call, without the reasoning of the first, as SDKs send it."""
    await talk.ask()
    talk.messages[1].pop("reasoning")
    await talk.ask(**fields)
    _, second = await talk.agent.traces()
    return way(second)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"stream": True}, "a stream's parser"),
        ({"response_format": {"type": "json_object"}}, "the grammar of response_format"),
        ({"structured_outputs": {"choice": ["a"]}}, "the grammar of structured_outputs"),
        ({"tool_choice": "required"}, "the grammar of tool_choice"),
        ({"thinking_token_budget": 10}, "thinking_token_budget"),
    ],
)
async def test_what_reads_the_prompt_gets_no_kept_reasoning(
    thinks: StandIn, talk: Talk, fields: dict[str, Any], why: str | None
) -> None:
    found = await forget_and_ask(talk, **fields)
    assert found[0] == ("exact" if why is None else "ordinary")
    assert (why or "") in found[1]
    if why is not None:
        *_, second = await talk.agent.traces()
        assert prompt(second) == thinks.render(talk.messages[:3])


async def test_a_stream_that_the_gateway_writes_is_parsed_as_json(
    connect: Callable[..., Any], thinks: StandIn
) -> None:
    thinks.routes = thinks.retokenises = True
    talk = Talk(await connect(continuation="exact"))
    assert await forget_and_ask(talk, stream=True) == ("exact", "")


async def test_an_engine_whose_parsing_was_not_read_gets_no_kept_reasoning(
    connect: Callable[..., Any], thinks: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Vllm, "parses_alone", ("0.28.",))
    thinks.retokenises = True
    found = await forget_and_ask(Talk(await connect(continuation="exact")))
    assert found == ("ordinary", "the kept ids hold earlier reasoning, and vllm 0.29.0 may read it")


async def test_reasoning_that_was_not_told_counts_as_well(talk: Talk) -> None:
    await talk.ask(include_reasoning=False)
    await talk.ask(stream=True)
    _, second = await talk.agent.traces()
    assert way(second)[0] == "ordinary"


@pytest.mark.parametrize(
    ("tool", "choice", "why"),
    [
        ({"function": {"name": "a", "strict": True}}, "auto", "a strict tool"),
        ({"function": {"name": "a", "strict": True}}, None, "a strict tool"),
        ({"function": {"name": "a", "strict": True}}, "none", None),
        ({"function": {"name": "a"}}, "auto", None),
        ({"function": {"name": "a"}}, {"type": "function"}, "tool_choice"),
        (7, "auto", None),
    ],
)
def test_which_tools_make_a_grammar(tool: Any, choice: Any, why: str | None) -> None:
    asked = {"tools": [tool], "tool_choice": choice}
    fields = {name: Raw(json.dumps(value).encode()) for name, value in asked.items()}
    found = misled(fields, Plan(api="chat"), Vllm(), "0.29.0")
    assert (found is None) == (why is None)
    assert (why or "") in (found or "")


# Another engine, another tokenizer.


async def test_ids_stay_with_the_engine_that_gave_them(
    connect: Callable[..., Any], engine: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "INTERVAL_S", 0.01)
    monkeypatch.setattr(health, "FIRST_BACKOFF_S", 0.01)
    engine.retokenises = True
    talk = Talk(await connect(continuation="exact"))
    upstream = talk.agent.gateway.upstreams.all[0]
    await talk.ask()
    upstream.turn_ends.add(END)
    engine.status = 503
    await until(lambda: not upstream.available)
    engine.status, engine.fingerprint = None, "vllm-0.29.0-other"
    await until(lambda: upstream.available and upstream.tokenizer == engine.fingerprint)
    await talk.ask()
    _, second = await talk.agent.traces()
    assert way(second)[0] == "ordinary"
    assert prompt(second) == engine.render(talk.messages[:3])
    assert upstream.turn_ends == set()


async def test_nor_do_they_outlive_it_over_a_restart_of_the_gateway(
    connect: Callable[..., Any], engine: StandIn
) -> None:
    engine.retokenises = True
    talk = Talk(await connect(continuation="exact"))
    await talk.ask()
    await talk.agent.flush()
    engine.fingerprint = "vllm-0.29.0-other"
    talk.agent = await connect(continuation="exact", port=0)
    await talk.ask()
    _, second = await talk.agent.traces()
    assert way(second)[0] == "ordinary"


async def test_an_engine_that_changed_unseen_is_named(talk: Talk, engine: StandIn) -> None:
    await talk.ask()
    engine.fingerprint = "vllm-0.29.0-other"
    await talk.ask()
    _, second = await talk.agent.traces()
    assert way(second) == ("exact", ANOTHER)


async def test_a_call_that_fails_over_leaves_its_ids_behind(
    connect: Callable[..., Any], engine: StandIn
) -> None:
    async with standing_in() as other:
        other.fingerprint = "vllm-0.29.0-other"
        engine.retokenises = other.retokenises = True
        urls = [engine.url, other.url]
        talk = Talk(await connect(upstream="", upstreams=urls, continuation="exact"))
        for upstream in talk.agent.gateway.upstreams.all:
            await upstream.ready()
        await talk.ask()
        first = engine if engine.bodies else other
        first.status = 503
        await talk.ask()
        _, second = await talk.agent.traces()
    assert second.meta.failed_over == [f"{first.url}: it answered 503"]
    assert way(second)[0] == "ordinary"
    assert "whose tokenizer may be another one" in way(second)[1]


@pytest.mark.parametrize("listed", [True, False])
async def test_a_loras_limit_is_its_base_models(
    connect: Callable[..., Any], engine: StandIn, monkeypatch: pytest.MonkeyPatch, listed: bool
) -> None:
    engine.limit = 60
    base: dict[str, Any] = {"id": "base", "owned_by": "vllm", "root": "/nowhere", "parent": None}
    lora: dict[str, Any] = {"id": "tiny", "owned_by": "vllm", "root": "/lora", "parent": "base"}
    engine.cards = [lora, base | ({"max_model_len": engine.limit} if listed else {})]

    def short(messages: list[dict[str, Any]]) -> list[int]:
        """A template that shows little of earlier answers."""
        texts = [(m["role"][0], m["content"][-3:]) for m in messages]
        return [*b"".join(f"{role}{text}\n".encode() for role, text in texts), ord("a")]

    monkeypatch.setattr(engine, "render", short)
    talk = Talk(await connect(continuation="exact"))
    await talk.ask(max_tokens=52)
    await talk.ask(max_tokens=4)
    _, second = await talk.agent.traces()
    why = "are over the model's 60" if listed else "answered 400 to the kept ids"
    assert way(second)[0] == "ordinary"
    assert why in way(second)[1]
    assert prompt(second) == short(talk.messages[:3])
