"""Retries and the limits of memory, without HTTP."""

from __future__ import annotations

import re

import pytest

from driftgate.errors import RequestError
from driftgate.gateway import sessions
from driftgate.gateway.conversation import read_conversation
from driftgate.gateway.sessions import TRAJECTORY_HEADER, Call, Place, Sessions

BODY = "0123456789abcdef"
HELLO = read_conversation(b'[{"role":"user","content":"hi"}]')


def begin(memory: Sessions, *, retry: int = 0, url: str | None = None) -> Call:
    place = memory.place(url=url, headers={}, metadata=None, history=HELLO)
    return memory.begin(place, call_id="c", body_sha256=BODY, sdk_retry=retry)


def test_failed_calls_of_a_group_are_retried_one_by_one() -> None:
    memory = Sessions()
    group = [begin(memory) for _ in range(3)]
    for call in group:
        memory.failed(call)
    retried = [begin(memory, retry=1) for _ in range(3)]
    assert [c.place.trajectory for c in retried] == [c.place.trajectory for c in group]
    assert {(c.step, c.retry) for c in retried} == {(0, 1)}
    assert begin(memory).place.trajectory not in {c.place.trajectory for c in group}


@pytest.mark.parametrize("name", [".", ".."])
def test_dots_name_no_trajectory(name: str) -> None:
    """Every client resolves them in an address: nobody could ask for such a run."""
    memory = Sessions()
    for url, headers in ((name, {}), (None, {TRAJECTORY_HEADER: name})):
        with pytest.raises(RequestError, match=f"no '{re.escape(name)}'"):
            memory.place(url=url, headers=headers, metadata=None, history=HELLO)
    with pytest.raises(RequestError, match="another name"):
        memory.mint(name)
    own = {"session-id": name}  # the agent's own purposes: it names nothing
    place = memory.place(url=None, headers=own, metadata={"trajectory_id": name}, history=HELLO)
    assert place.attribution == "new"
    assert memory.mint("...")[0] == "..."


def test_a_retry_of_a_retry_counts_on() -> None:
    memory = Sessions()
    call = begin(memory, url="t")
    for retry in (1, 2):
        memory.failed(call)
        call = begin(memory, url="t", retry=retry)
        assert (call.step, call.retry) == (0, retry)


def test_a_retry_that_could_be_of_several_calls_is_ambiguous() -> None:
    memory = Sessions()
    names = {begin(memory).place.trajectory for _ in range(2)}
    call = begin(memory, retry=1)
    assert set(call.place.ambiguous) == names
    assert call.place.trajectory not in names


def test_a_retry_before_the_first_try_has_ended() -> None:
    memory = Sessions()
    first = begin(memory, url="t")
    again = begin(memory, url="t", retry=1)
    assert (again.place.trajectory, again.step) == (first.place.trajectory, 0)


def test_an_unnamed_retry_of_a_call_that_has_not_failed_may_be_another_agents() -> None:
    memory = Sessions()
    first = begin(memory)
    again = begin(memory, retry=1)
    assert again.place.attribution == "new"
    assert again.place.ambiguous == (first.place.trajectory,)


def test_a_retry_of_one_of_two_equal_calls_stays_in_the_named_trajectory() -> None:
    memory = Sessions()
    begin(memory, url="t")
    begin(memory, url="t")
    again = begin(memory, url="t", retry=1)
    assert (again.place.trajectory, again.step, again.place.ambiguous) == ("t", 1, ())


def test_the_same_call_of_two_trajectories_is_no_retry() -> None:
    memory = Sessions()
    memory.failed(begin(memory, url="a"))
    assert begin(memory, url="b").retry == 0


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "MAX_TURNS", 2)
    memory = Sessions()
    assert HELLO is not None
    for text in ("one", "two", "three"):
        memory.answered(begin(memory), [HELLO.answered({"content": text})])
    for text, rule in (("one", "new"), ("three", "prefix")):
        said = f'[{{"role":"user","content":"hi"}},{{"role":"assistant","content":"{text}"}}]'
        conversation = read_conversation(said.encode())
        place = memory.place(url=None, headers={}, metadata=None, history=conversation)
        assert place.attribution == rule


def test_steps_go_on_from_the_index_and_from_what_was_given_meanwhile() -> None:
    memory = Sessions()
    assert begin(memory, url="t").step == 0
    memory.resume("t", 7)
    assert begin(memory, url="t").step == 7
    memory.resume("t", 3)
    place = memory.place(url="t", headers={}, metadata=None, history=None)
    assert memory.begin(place, call_id="c", body_sha256="other", sdk_retry=0).step == 8


@pytest.mark.parametrize(
    ("once", "again"),
    [
        ('{"content": "a"}', '{"content": [{"type": "text", "text": "a"}]}'),
        ('{"content": null}', '{"content": ""}'),
        ('{"content": "a", "reasoning": "b"}', '{"content": "a"}'),
        ('{"content": "<think>b</think>\\na"}', '{"content": "a"}'),
    ],
)
def test_an_assistants_message_is_known_in_other_clothes(once: str, again: str) -> None:
    def turn(message: str) -> bytes:
        given = message.replace("{", '{"role": "assistant", ', 1)
        conversation = read_conversation(f"[{given}]".encode())
        assert conversation is not None
        return conversation.turns[0].digest

    assert turn(once) == turn(again)


def test_what_is_read_of_the_store_twice_can_be_repeated_once() -> None:
    memory = Sessions()
    earlier = [Call("old", Place("t", "url"), 0, 0, BODY, failed=True)]
    memory.resume("t", 1, earlier)
    first = begin(memory, url="t")
    memory.resume("t", 1, earlier)  # by a call that came at the same time
    memory.restore("t", [], earlier, None)
    assert (first.step, first.retry) == (0, 1)
    assert (begin(memory, url="t").step, begin(memory, url="t").step) == (1, 2)


def test_a_run_whose_calls_were_not_read_gets_them_later() -> None:
    memory = Sessions()
    begin(memory, url="t")
    memory.unread("t")
    earlier = [Call("old", Place("t", "url"), 4, 0, "other", failed=True)]
    memory.restore("t", [], earlier, None)
    memory.resume("t", 5, earlier)
    place = memory.place(url="t", headers={}, metadata=None, history=None)
    again = memory.begin(place, call_id="c", body_sha256="other", sdk_retry=0)
    assert (again.step, again.retry) == (4, 1)
    assert memory.begin(place, call_id="c2", body_sha256="other", sdk_retry=0).step == 5
