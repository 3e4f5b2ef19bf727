"""What the tellers make of chat answers, held against the SDKs' types; streams against JSON."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from driftgate.errors import UpstreamError
from driftgate.gateway.anthropic_answer import MessagesTeller
from driftgate.gateway.openai import Plan, read_request
from driftgate.gateway.responses_answer import ResponsesTeller
from driftgate.gateway.synthesis import stream_of
from driftgate.spoken import message_of
from tests.gateway.sdk_shapes import (
    anthropic_message,
    message_of_stream,
    openai_response,
    response_of_stream,
)

CALL = "c-" + "0" * 32
USAGE = {
    "prompt_tokens": 7,
    "completion_tokens": 3,
    "total_tokens": 10,
    "prompt_tokens_details": {"cached_tokens": 4},
}
HEAD = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 7, "model": "tiny"}
Message = dict[str, Any]


def messages(request: Message | None = None) -> MessagesTeller:
    return MessagesTeller(CALL)


def responses(request: Message | None = None) -> ResponsesTeller:
    return ResponsesTeller(read_request(json.dumps(request or {"model": "tiny"}).encode()), CALL)


def event(value: Any) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def answer(message: Message, finish: str = "stop", stop: Any = None) -> bytes:
    choice = {"index": 0, "message": message, "finish_reason": finish, "stop_reason": stop}
    return json.dumps({**HEAD, "choices": [choice], "usage": USAGE}).encode()


def chunks(message: Message, finish: str = "stop", cut: int = 3, stop: Any = None) -> list[bytes]:
    """The stream of a message, its texts in pieces of ``cut`` characters."""
    deltas: list[Any] = [{"role": "assistant", "content": ""}]
    for name in ("reasoning", "content"):
        text = message.get(name) or ""
        deltas += [{name: text[i : i + cut]} for i in range(0, len(text), cut)]
    for index, call in enumerate(message.get("tool_calls") or ()):
        name, said = call["function"]["name"], call["function"]["arguments"]
        function = {"name": name, "arguments": ""}
        deltas.append({"tool_calls": [{**call, "index": index, "function": function}]})
        for i in range(0, len(said), cut):
            piece = {"index": index, "function": {"arguments": said[i : i + cut]}}
            deltas.append({"tool_calls": [piece]})
    events = [{**HEAD, "choices": [{"index": 0, "delta": delta}]} for delta in deltas]
    events[0]["prompt_token_ids"] = list(range(7))
    last = {"index": 0, "delta": {}, "finish_reason": finish, "stop_reason": stop}
    return [
        *map(event, events),
        event({**HEAD, "choices": [last]}),
        event({**HEAD, "choices": [], "usage": USAGE}),
    ]


def told(teller: Any, events: list[bytes]) -> bytes:
    said = [part for one in events for part in teller.take(one)]
    return b"".join([*said, *teller.end()])


def call(name: str, arguments: str, call_id: str = "call_1") -> Message:
    function = {"name": name, "arguments": arguments}
    return {"id": call_id, "type": "function", "function": function}


TEXT = {"role": "assistant", "content": "Hello é…"}
TOOLS = {"content": None, "tool_calls": [call("a", '{"x": 1.50}'), call("b", "{}", "call_2")]}
ALL = {"reasoning": "hm hm", "content": "So:", "tool_calls": [call("a", '{"x": [1, 2]}')]}
ANSWERS = [TEXT, TOOLS, ALL, {"content": ""}, {"reasoning": "only thought", "content": None}]


@pytest.mark.parametrize("message", ANSWERS)
@pytest.mark.parametrize("finish", ["stop", "length", "tool_calls"])
def test_a_stream_ends_as_the_json_answer(message: Message, finish: str) -> None:
    whole = responses().answer(answer(message, finish))
    teller = responses()
    assert response_of_stream(told(teller, chunks(message, finish))) == openai_response(whole)
    assert teller.body() == whole
    whole = messages().answer(answer(message, finish))
    said = messages()
    assert message_of_stream(told(said, chunks(message, finish))) == anthropic_message(whole)
    assert said.body() == whole


@pytest.mark.parametrize("message", ANSWERS)
def test_the_message_can_be_read_back(message: Message) -> None:
    expected = {"role": "assistant", **message}
    for teller in (responses(), messages()):
        found = message_of(teller.answer(answer(message)))
        assert (found["content"] or None) == (expected["content"] or None)
        for name in ("reasoning", "tool_calls"):
            assert found.get(name) == expected.get(name)


TEXTS = st.text(max_size=12)
CALLS = st.lists(st.tuples(st.sampled_from("abc"), st.dictionaries(TEXTS, st.integers())))


@settings(max_examples=60)
@given(TEXTS, TEXTS, CALLS, st.integers(1, 5))
def test_any_answer_however_it_is_cut(thought: str, text: str, made: list[Any], cut: int) -> None:
    message: Message = {"content": text}
    if thought:
        message["reasoning"] = thought
    message["tool_calls"] = [
        call(name, json.dumps(value), f"call_{i}") for i, (name, value) in enumerate(made)
    ]
    response = response_of_stream(told(responses(), chunks(message, cut=cut)))
    assert response == openai_response(responses().answer(answer(message)))
    assert response.output_text == text
    said = message_of_stream(told(messages(), chunks(message, cut=cut)))
    assert said == anthropic_message(messages().answer(answer(message)))
    assert [b.input for b in said.content if b.type == "tool_use"] == [v for _, v in made]


@pytest.mark.parametrize(
    ("finish", "stop", "message", "expected"),
    [
        ("stop", None, TEXT, ("end_turn", None, "completed", None)),
        ("stop", 151645, TEXT, ("end_turn", None, "completed", None)),
        ("stop", "END", TEXT, ("stop_sequence", "END", "completed", None)),
        ("length", None, TEXT, ("max_tokens", None, "incomplete", "max_output_tokens")),
        ("tool_calls", None, TOOLS, ("tool_use", None, "completed", None)),
        ("stop", None, TOOLS, ("tool_use", None, "completed", None)),
        ("content_filter", None, TEXT, ("refusal", None, "incomplete", "content_filter")),
    ],
)
def test_why_an_answer_ended(
    finish: str, stop: Any, message: Message, expected: tuple[Any, ...]
) -> None:
    said = anthropic_message(messages().answer(answer(message, finish, stop)))
    response = openai_response(responses().answer(answer(message, finish, stop)))
    why = response.incomplete_details and response.incomplete_details.reason
    assert (said.stop_reason, said.stop_sequence, response.status, why) == expected


@pytest.mark.parametrize("finish", ["abort", "error", "repetition", "unheard_of", None])
@pytest.mark.parametrize("message", ANSWERS)
def test_an_answer_that_the_engine_ended_early_has_no_clean_end(
    message: Message, finish: Any
) -> None:
    for stream in (chunks(message, finish), [event(json.loads(answer(message, finish)))]):
        said = told(messages(), stream)
        assert b"message_stop" not in said
        assert said.rpartition(b"event: ")[2].startswith(b"error\n")
        assert b'"error":{"type":"overloaded_error","message":"the engine ended its' in said
        *_, failed = told(responses(), stream).split(b"event: ")
        assert failed.startswith(b"response.failed\n")
        assert b'"status":"failed"' in failed
    body = messages().answer(answer(message, finish))
    assert anthropic_message(body).stop_reason is None


def test_usage_is_the_engines() -> None:
    usage = openai_response(responses().answer(answer(TEXT))).usage
    assert usage is not None
    assert (usage.input_tokens, usage.output_tokens, usage.total_tokens) == (7, 3, 10)
    assert usage.input_tokens_details.cached_tokens == 4
    said = anthropic_message(messages().answer(answer(TEXT))).usage
    assert (said.input_tokens, said.cache_read_input_tokens, said.output_tokens) == (3, 4, 3)
    begun = messages().take(chunks(TEXT)[0])[0]
    assert b'"usage":{"input_tokens":7,"output_tokens":0}' in begun


def test_the_first_token_is_told_with_its_chunk() -> None:
    for teller in (responses(), messages()):
        first, second, *_ = chunks(TEXT)
        teller.take(first)
        assert b"Hel" in b"".join(teller.take(second))


def test_logprobs_are_shown_where_they_were_asked_for() -> None:
    rows = [
        {"token": "Hi", "logprob": -0.5, "bytes": [72, 105], "top_logprobs": []},
    ]
    choice: dict[str, Any] = {"index": 0, "delta": {"content": "Hi"}, "finish_reason": "stop"}
    choice["logprobs"] = {"content": rows}
    stream = [event({**HEAD, "choices": [choice]})]
    asked = {"model": "tiny", "include": ["message.output_text.logprobs"]}
    shown = response_of_stream(told(responses(asked), stream)).output[0]
    hidden = response_of_stream(told(responses(), stream)).output[0]
    assert shown.type == hidden.type == "message"
    assert shown.content[0].type == hidden.content[0].type == "output_text"
    assert [row.model_dump() for row in shown.content[0].logprobs or ()] == rows
    assert hidden.content[0].logprobs == []


def rows_of(*tokens: str) -> list[Any]:
    return [
        {"token": t, "logprob": -1.0, "bytes": [*t.encode()], "top_logprobs": []} for t in tokens
    ]


@pytest.mark.parametrize(
    ("tokens", "message", "shown"),
    [
        (["hm", "</think>", "Hi", " you", "<|im_end|>"], {"reasoning": "hm"}, ["Hi", " you"]),
        (["Hi", " you", "<|im_end|>"], {}, ["Hi", " you"]),
        (["Hi", " ", "", "you", ""], {}, ["Hi", " ", "", "you"]),
        (["Hi", " you", "</think>", "Hi", " you"], {"reasoning": "Hi you"}, []),
        (["hm</think>Hi", " you"], {"reasoning": "hm"}, []),
        (["Hi", " youST", "OP"], {}, []),
        (["Hi", " you", "<tool_call>"], {"tool_calls": [call("a", "{}")]}, ["Hi", " you"]),
    ],
)
def test_a_texts_logprobs_are_its_own(
    tokens: list[str], message: Message, shown: list[str]
) -> None:
    body = json.loads(answer({"role": "assistant", "content": "Hi you"} | message))
    body["choices"][0] |= {"logprobs": {"content": rows_of(*tokens)}, "token_ids": [1]}
    raw = json.dumps(body).encode()
    asked = {"model": "tiny", "include": ["message.output_text.logprobs"]}
    written = responses(asked)
    written.whole = True
    plan = Plan(api="chat", stream=True, usage_asked=True)
    for response in (
        openai_response(responses(asked).answer(raw)),
        response_of_stream(told(written, stream_of(raw, plan))),
    ):
        (text,) = [item for item in response.output if item.type == "message"]
        assert text.content[0].type == "output_text"
        assert [row.token for row in text.content[0].logprobs or ()] == shown


def test_a_piece_that_ends_the_thoughts_shows_its_texts_rows() -> None:
    delta = {"reasoning": "hm", "content": "Hi"}
    choice = {"index": 0, "delta": delta, "finish_reason": "stop"}
    choice["logprobs"] = {"content": rows_of("hm", "</think>", "Hi")}
    teller = responses({"model": "tiny", "include": ["message.output_text.logprobs"]})
    response = response_of_stream(told(teller, [event({**HEAD, "choices": [choice]})]))
    (text,) = [item for item in response.output if item.type == "message"]
    assert text.content[0].type == "output_text"
    assert [row.token for row in text.content[0].logprobs or ()] == ["Hi"]


def test_a_cut_tool_call_keeps_its_text() -> None:
    cut = {"content": None, "tool_calls": [call("a", '{"x": 1')]}
    body = messages().answer(answer(cut, "length"))
    assert anthropic_message(body).content[0].model_dump()["input"] == {"INVALID_JSON": '{"x": 1'}
    assert message_of(body)["tool_calls"] == cut["tool_calls"]


def test_an_error_in_a_stream_ends_it_in_the_apis_words() -> None:
    stream = [*chunks(TEXT)[:3], event({"error": {"message": "boom"}})]
    said = told(messages(), stream)
    assert said.endswith(
        b'event: error\ndata: {"type":"error","error":{"type":"api_error","message":"boom"}}\n\n'
    )
    *_, error, failed = told(responses(), stream).split(b"event: ")
    assert error.startswith(b"error\n")
    assert failed.startswith(b"response.failed\n")
    assert b'"status":"failed","error":{"code":"server_error","message":"boom"}' in failed


def test_comments_pass_and_what_is_no_chunk_says_nothing() -> None:
    for teller in (responses(), messages()):
        assert teller.take(b": keep-alive\n\n") == [b": keep-alive\n\n"]
        assert teller.take(b"data: nonsense\n\n") == []
        assert teller.end() == []


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'{"choices": []}', b'{"choices": 3}'])
def test_an_answer_that_is_none_is_the_engines_fault(body: bytes) -> None:
    for teller in (responses(), messages()):
        with pytest.raises(UpstreamError, match="not a completion"):
            teller.answer(body)
