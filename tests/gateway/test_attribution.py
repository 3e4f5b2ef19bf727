"""Which trajectory and step a call gets, over real calls: DESIGN 7's table."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from driftgate.gateway import restore, sessions

if TYPE_CHECKING:
    from tests.gateway.conftest import Agent, StandIn

USER = {"role": "user", "content": "hi"}
NEXT = {"role": "user", "content": "and then?"}
CHAT: dict[str, Any] = {"model": "tiny", "messages": [USER], "seed": 3}
TOOLS = [{"type": "function", "function": {"name": "echo"}}]

Place = tuple[str, int, str]


async def ask(agent: Agent, messages: list[Any], **extra: Any) -> list[dict[str, Any]]:
    """The messages of the answer's choices."""
    headers = extra.pop("headers", None)
    status, body = await agent.send(CHAT | {"messages": messages} | extra, headers=headers)
    assert status == 200
    return [choice["message"] for choice in json.loads(body)["choices"]]


async def streamed(agent: Agent, messages: list[Any]) -> dict[str, Any]:
    """The message that a stream adds up to."""
    _, raw = await agent.send(CHAT | {"messages": messages, "stream": True})
    parts = [json.loads(e[6:]) for e in raw.split(b"\n\n") if e.startswith(b"data: {")]
    text = "".join(c["choices"][0]["delta"].get("content", "") for c in parts)
    return {"role": "assistant", "content": text}


async def places(agent: Agent) -> list[Place]:
    traces = sorted(await agent.traces(), key=lambda t: (t.meta.started_ns, t.meta.choice))
    return [(t.meta.trajectory, t.meta.step, t.meta.attribution) for t in traces]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"path": "/t/a%2Fb/v1/chat/completions"}, ("a/b", "url")),
        ({"headers": {"x-driftgate-trajectory": "h"}}, ("h", "header")),
        ({"headers": {"X-Claude-Code-Session-Id": "cc"}}, ("cc", "session_header")),
        ({"headers": {"session-id": "codex"}}, ("codex", "session_header")),
        ({"headers": {"x-session-id": "oc"}}, ("oc", "session_header")),
        (
            {"path": "/t/u/v1/chat/completions", "headers": {"x-driftgate-trajectory": "h"}},
            ("u", "url"),
        ),
    ],
)
async def test_a_named_trajectory(
    agent: Agent, options: dict[str, Any], expected: tuple[str, str]
) -> None:
    for _ in range(2):
        await agent.send(CHAT, **options)
    name, rule = expected
    assert await places(agent) == [(name, 0, rule), (name, 1, rule)]


async def test_metadata_names_a_trajectory(agent: Agent) -> None:
    await ask(agent, [USER], metadata={"trajectory_id": "m"})
    assert await places(agent) == [("m", 0, "metadata")]


async def test_a_minted_key_names_a_trajectory_and_stays_here(
    agent: Agent, engine: StandIn
) -> None:
    async with agent.http.post(agent.url + "/api/trajectories", json={"trajectory": "k"}) as made:
        key = (await made.json())["key"]
    await ask(agent, [USER], headers={"Authorization": f"Bearer {key}"})
    assert await places(agent) == [("k", 0, "key")]
    assert "Authorization" not in engine.headers[-1]
    status, _ = await agent.send(CHAT, headers={"Authorization": "Bearer dgk_unknown"})
    assert status == 400


@pytest.mark.parametrize("name", ["%00", "a%0Ab", "x" * 201, "%20a"])
async def test_a_name_that_is_none_is_refused(agent: Agent, name: str) -> None:
    status, _ = await agent.send(CHAT, path=f"/t/{name}/v1/chat/completions")
    assert status == 400


@pytest.mark.parametrize("stream", [False, True])
async def test_a_conversation_is_followed_by_its_answers(agent: Agent, stream: bool) -> None:
    (first,) = await ask(agent, [USER])
    if stream:
        second = await streamed(agent, [USER, first, NEXT])
    else:
        (second,) = await ask(agent, [USER, first, NEXT])
    await ask(agent, [USER, first, NEXT, second, NEXT])
    (one, *others) = await places(agent)
    assert one[1:] == (0, "new")
    assert others == [(one[0], 1, "prefix"), (one[0], 2, "prefix")]
    roots = await agent.traces()
    assert [t.meta.parent for t in roots] == [None, roots[0].meta.trace_id, roots[1].meta.trace_id]


async def test_an_equal_prompt_is_a_new_trajectory(agent: Agent) -> None:
    await asyncio.gather(*(ask(agent, [USER], seed=i) for i in range(4)))
    await ask(agent, [USER], seed=0)
    found = await places(agent)
    assert len({trajectory for trajectory, _, _ in found}) == 5
    assert {rule for _, _, rule in found} == {"new"}


async def test_a_group_of_rollouts_never_mixes(agent: Agent) -> None:
    async def rollout(seed: int) -> None:
        messages: list[Any] = [USER]
        for _ in range(3):
            (answer,) = await ask(agent, messages, seed=seed)
            messages += [answer, NEXT]

    await asyncio.gather(*(rollout(seed) for seed in range(6)))
    by_trajectory: dict[str, set[int]] = {}
    for trace in await agent.traces():
        by_trajectory.setdefault(trace.meta.trajectory, set()).add(trace.meta.sampling.seed or 0)
    assert sorted(map(len, by_trajectory.values())) == [1] * 6


async def test_equal_answers_are_told_apart_by_their_tool_ids(
    agent: Agent, engine: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = iter(["call-a", "call-b"])
    original = engine.tool_call
    monkeypatch.setattr(
        engine, "tool_call", lambda text, choice: original(text, choice) | {"id": next(ids)}
    )
    a, b = [(await ask(agent, [USER], tools=TOOLS))[0] for _ in range(2)]
    monkeypatch.setattr(engine, "tool_call", original)
    for message in (b, a):
        result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "ok"}
        await ask(agent, [USER, message, result])
    first, second, third, fourth = await places(agent)
    assert (third[0], fourth[0]) == (second[0], first[0])


async def test_what_cannot_be_told_apart_is_new_and_says_so(agent: Agent) -> None:
    (answer,) = await ask(agent, [USER])
    await ask(agent, [USER])
    (later,) = await ask(agent, [USER, answer, NEXT])
    await ask(agent, [USER, answer, NEXT, later, NEXT])
    first, second, third, fourth = [t.meta for t in await agent.traces()]
    assert third.attribution == "new"
    assert sorted(third.ambiguous) == sorted([first.trajectory, second.trajectory])
    assert (fourth.trajectory, fourth.attribution) == (third.trajectory, "prefix")


async def test_either_of_two_choices_can_be_continued(agent: Agent) -> None:
    answers = await ask(agent, [USER], n=2)
    for answer in answers:
        await ask(agent, [USER, answer, NEXT])
    found = await places(agent)
    assert len({trajectory for trajectory, _, _ in found}) == 1
    traces = await agent.traces()
    assert [t.meta.parent for t in traces[2:]] == [t.meta.trace_id for t in traces[:2]]


async def test_a_history_that_comes_back_changed_is_recognised(agent: Agent) -> None:
    (answer,) = await ask(agent, [USER], tools=TOOLS)
    call = answer["tool_calls"][0]
    arguments = json.dumps(json.loads(call["function"]["arguments"]), indent=2)
    changed = {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"id": "mine", "type": "function", "function": {"name": "echo", "arguments": arguments}}
        ],
    }
    await ask(agent, [USER, changed, {"role": "tool", "tool_call_id": "mine", "content": "ok"}])
    assert [(step, rule) for _, step, rule in await places(agent)] == [(0, "new"), (1, "prefix")]


async def test_a_retry_keeps_its_step(agent: Agent, engine: StandIn) -> None:
    await agent.gateway.upstreams.all[0].ready()
    engine.status = 500
    await agent.send(CHAT)
    engine.status = None
    await agent.send(CHAT, headers={"x-stainless-retry-count": "1"})
    (trace,) = await agent.traces()
    assert (trace.meta.step, trace.meta.retry) == (0, 1)
    reader = agent.gateway.reader
    assert reader is not None
    failed, repeated = reader.calls(trace.meta.trajectory)
    assert (failed.state, repeated.state) == ("failed", "done")
    assert reader.trajectory(trace.meta.trajectory).complete


async def test_the_same_body_after_a_failure_is_a_retry(agent: Agent, engine: StandIn) -> None:
    path = "/t/named/v1/chat/completions"
    engine.status = 500
    await agent.send(CHAT, path=path)
    engine.status = None
    await agent.send(CHAT, path=path)
    await agent.send(CHAT, path=path)
    found = [(t.meta.step, t.meta.retry) for t in await agent.traces()]
    assert found == [(0, 1), (1, 0)]


async def test_steps_go_on_after_a_restart(connect: Callable[..., Any], engine: StandIn) -> None:
    path = "/t/named/v1/chat/completions"
    first = await connect()
    await first.send(CHAT, path=path)
    await first.flush()
    second = await connect()
    engine.tokens = 3
    await second.send(CHAT | {"messages": [USER, NEXT]}, path=path)
    assert [(t.meta.step, t.meta.trajectory) for t in await second.traces()] == [
        (0, "named"),
        (1, "named"),
    ]


TEXT: dict[str, Any] = {"model": "tiny", "seed": 3}
COMPLETIONS = "/v1/completions"


async def complete(agent: Agent, prompt: Any, **extra: Any) -> list[dict[str, Any]]:
    """The answer's choices; of a stream, the pieces of its one choice joined."""
    status, raw = await agent.send(TEXT | {"prompt": prompt} | extra, path=COMPLETIONS)
    assert status == 200
    if not extra.get("stream"):
        return list(json.loads(raw)["choices"])
    parts = [
        json.loads(e[6:])["choices"][0] for e in raw.split(b"\n\n") if e.startswith(b"data: {")
    ]
    ids = [i for part in parts for i in part.get("token_ids") or ()]
    return [{"text": "".join(part["text"] for part in parts), "token_ids": ids}]


@pytest.mark.parametrize("policy", ["serve", "refuse"])
async def test_a_run_whose_steps_cannot_be_read(
    connect: Callable[..., Any], tmp_path: Path, policy: str
) -> None:
    """It is served from memory, and numbered behind the store again when that can be read."""
    run = {"headers": {"x-driftgate-trajectory": "run"}}
    before = await connect()
    for text in ("one", "two"):
        await before.send(CHAT | {"user": text}, **run)
    await before.flush()
    agent = await connect(on_capture_failure=policy)
    await agent.gateway.proxy.restored.wait()
    index = tmp_path / "store" / "index.sqlite"
    index.rename(index.with_suffix(".away"))
    status, body = await agent.send(CHAT | {"user": "three"}, **run)
    index.with_suffix(".away").rename(index)
    assert status == (200 if policy == "serve" else 503), body
    await agent.send(CHAT | {"user": "four"}, **run)
    steps = sorted(step for _, step, _ in await places(agent))
    assert steps == ([0, 0, 1, 2] if policy == "serve" else [0, 1, 2])


@pytest.mark.parametrize("stream", [False, True])
async def test_a_text_prompt_is_followed_by_what_was_sampled(agent: Agent, stream: bool) -> None:
    prompt = "long " * 300
    for _ in range(3):
        (choice,) = await complete(agent, prompt, stream=stream)
        prompt += choice["text"] + " and then? "
    await complete(agent, "long " * 300 + "and then?")
    (one, *others, fresh) = await places(agent)
    assert one[1:] == (0, "new")
    assert others == [(one[0], 1, "prefix"), (one[0], 2, "prefix")]
    assert fresh[0] != one[0]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("first", [[5, 6, 7], "text"])
async def test_an_id_prompt_is_followed_by_the_ids_that_were_sampled(
    agent: Agent, stream: bool, first: Any
) -> None:
    extra = {"stream": stream, "return_token_ids": True}
    (choice,) = await complete(agent, first, **extra)
    sent = first if isinstance(first, list) else list(first.encode())
    await complete(agent, [*sent, *choice["token_ids"], 9])
    await complete(agent, [*sent, 9])
    one, two, three = await places(agent)
    assert two == (one[0], 1, "prefix")
    assert three[1:] == (0, "new")


async def test_ids_that_the_agent_was_not_given_are_not_continued(agent: Agent) -> None:
    (choice,) = await complete(agent, "text")
    assert choice["token_ids"] is None
    (trace,) = await agent.traces()
    assert trace.response_ids is not None
    await complete(agent, [*b"text", *trace.response_ids.tolist()])
    assert {rule for _, _, rule in await places(agent)} == {"new"}


async def test_chat_ids_are_continued_as_a_prompt(agent: Agent) -> None:
    _, body = await agent.send(CHAT | {"return_token_ids": True})
    answer = json.loads(body)
    await complete(agent, [*answer["prompt_token_ids"], *answer["choices"][0]["token_ids"], 9])
    one, two = await places(agent)
    assert two == (one[0], 1, "prefix")


async def test_texts_that_cannot_be_told_apart_are_new(agent: Agent) -> None:
    (choice,) = await complete(agent, "a")
    await complete(agent, "a")
    (later,) = await complete(agent, "a" + choice["text"])
    await complete(agent, "a" + choice["text"] + later["text"])
    first, second, third, fourth = [t.meta for t in await agent.traces()]
    assert third.attribution == "new"
    assert sorted(third.ambiguous) == sorted([first.trajectory, second.trajectory])
    assert (fourth.trajectory, fourth.attribution) == (third.trajectory, "prefix")


async def test_several_prompts_in_one_call_are_new(agent: Agent) -> None:
    one, other = await complete(agent, ["a", "b"])
    await complete(agent, ["a" + one["text"], "b" + other["text"]])
    await complete(agent, "a" + one["text"])
    assert len({trajectory for trajectory, _, _ in await places(agent)}) == 3


async def test_an_answer_of_no_tokens_is_no_turn(agent: Agent, engine: StandIn) -> None:
    engine.tokens = 0
    for _ in range(2):
        await complete(agent, "a")
    assert [(step, rule) for _, step, rule in await places(agent)] == [(0, "new")] * 2


async def restarted(connect: Callable[..., Any], agent: Agent) -> Agent:
    """A second gateway over the store of the first, which has written all it has."""
    await agent.flush()
    other: Agent = await connect()
    return other


@pytest.mark.parametrize("stream", [False, True])
async def test_an_unnamed_chat_goes_on_after_a_restart(
    connect: Callable[..., Any], stream: bool
) -> None:
    agent = await connect()
    messages: list[Any] = [USER]
    for _ in range(2):
        answer = await streamed(agent, messages) if stream else (await ask(agent, messages))[0]
        messages += [answer, NEXT]
    agent = await restarted(connect, agent)
    await ask(agent, messages)
    one, *others = await places(agent)
    assert others == [(one[0], 1, "prefix"), (one[0], 2, "prefix")]
    traces = await agent.traces()
    assert traces[2].meta.parent == traces[1].meta.trace_id


async def test_unnamed_prompts_go_on_after_a_restart(connect: Callable[..., Any]) -> None:
    agent = await connect()
    (said,) = await complete(agent, "text")
    (given,) = await complete(agent, [1, 2], return_token_ids=True)
    agent = await restarted(connect, agent)
    await complete(agent, "text" + said["text"] + "more")
    await complete(agent, [1, 2, *given["token_ids"], 3])
    one, two, *others = await places(agent)
    assert others == [(one[0], 1, "prefix"), (two[0], 1, "prefix")]


async def test_what_could_not_be_told_apart_still_cannot_after_a_restart(
    connect: Callable[..., Any],
) -> None:
    agent = await connect()
    (choice,) = await complete(agent, "a")
    await complete(agent, "a")
    (later,) = await complete(agent, "a" + choice["text"])
    agent = await restarted(connect, agent)
    await complete(agent, "a" + choice["text"] + "x")
    await complete(agent, "a" + choice["text"] + later["text"])
    metas = sorted((t.meta for t in await agent.traces()), key=lambda m: m.started_ns)
    first, second, third, fourth, fifth = metas
    assert set(fourth.ambiguous) == {first.trajectory, second.trajectory}
    assert fifth.trajectory == third.trajectory


@pytest.mark.parametrize("headers", [{"x-stainless-retry-count": "1"}, None])
async def test_a_call_that_was_open_is_retried_after_a_restart(
    connect: Callable[..., Any], engine: StandIn, headers: dict[str, str] | None
) -> None:
    agent = await connect()
    (answer,) = await ask(agent, [USER])
    engine.hold = asyncio.Event()
    engine.came.clear()
    cut = asyncio.create_task(agent.send(CHAT | {"messages": [USER, answer, NEXT]}))
    await engine.came.wait()
    held, engine.hold = engine.hold, None
    await agent.flush()
    agent.gateway.sink._appender.close()  # as its death would
    agent_after = await restarted(connect, agent)
    await ask(agent_after, [USER, answer, NEXT], headers=headers)
    await ask(agent_after, [USER, answer, NEXT, answer, NEXT])
    held.set()
    await cut
    (trajectory,) = {name for name, _, _ in await places(agent_after)}
    calls = agent_after.gateway.reader.calls(trajectory)  # type: ignore[union-attr]
    assert [(c.step, c.retry) for c in calls] == [(0, 0), (1, 0), (1, 1), (2, 0)]


@pytest.mark.parametrize("headers", [{"x-stainless-retry-count": "1"}, None])
@pytest.mark.parametrize("is_restored", [True, False])
async def test_a_named_call_that_failed_is_retried_after_a_restart(
    connect: Callable[..., Any], engine: StandIn, monkeypatch: pytest.MonkeyPatch,
    headers: dict[str, str] | None, is_restored: bool,
) -> None:  # fmt: skip
    """Whether the store has been read by then, will be, or would not be for its age."""
    path = "/t/run/v1/chat/completions"
    agent = await connect()
    engine.status = 500
    await agent.send(CHAT, path=path)
    engine.status = None
    if not is_restored:
        monkeypatch.setattr(restore, "RESTORED_AGE_S", -60)
    agent = await restarted(connect, agent)
    if is_restored:
        await agent.gateway.proxy.restored.wait()
    assert (await agent.send(CHAT, path=path, headers=headers))[0] == 200
    await agent.gateway.proxy.restored.wait()
    assert (await agent.send(CHAT, path=path))[0] == 200  # asked again, and not a retry
    reader = agent.gateway.reader
    assert reader is not None
    await agent.flush()
    assert [(c.step, c.retry) for c in reader.calls("run")] == [(0, 0), (0, 1), (1, 0)]
    assert reader.trajectory("run").complete


@pytest.mark.parametrize(
    ("module", "name", "value", "rules"),
    [
        (sessions, "MAX_TURNS", 1, ["new", "prefix"]),
        (restore, "RESTORED_AGE_S", -60, ["new", "new"]),
    ],
)
async def test_what_is_remembered_after_a_restart_has_limits(
    connect: Callable[..., Any], monkeypatch: pytest.MonkeyPatch,
    module: Any, name: str, value: int, rules: list[str],
) -> None:  # fmt: skip
    agent = await connect()
    answers = [(await ask(agent, [USER], seed=seed))[0] for seed in range(2)]
    monkeypatch.setattr(module, name, value)
    agent = await restarted(connect, agent)
    for answer in reversed(answers):  # the newest first: its answer displaces what is remembered
        await ask(agent, [USER, answer, NEXT])
    assert sorted(rule for _, _, rule in (await places(agent))[2:]) == rules
