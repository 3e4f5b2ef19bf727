"""Agents side by side never mix: many runs that share prompts, answers and tool ids, against an
oracle that knows which run each call came from."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from driftgate.gateway import prompts
from driftgate.gateway.conversation import Conversation, Turn, read_conversation
from driftgate.gateway.prompts import End, Prompt
from driftgate.gateway.sessions import Call, Sessions

Said = list[tuple[str, str]]


@dataclass(eq=False)
class Run:
    """One agent's: what was said so far, as (role, text), and the call under way."""

    said: Said
    pending: Call | None = None
    retries: int = 0
    rules: list[str] = field(default_factory=list)


class Simulation:
    """Runs interleaved at random over one memory. ``read`` makes a history of what was said."""

    def __init__(
        self,
        seed: int,
        read: Callable[[Said], Conversation | Prompt],
        *,
        answers: list[str],
        notes: list[str],
    ) -> None:
        self.random = random.Random(seed)
        self.read = read
        self.answers = answers
        self.notes = notes
        self.memory = Sessions()
        self.owners: dict[str, Run] = {}
        self.began_ambiguous: set[str] = set()
        self.runs = [Run([("user", self.random.choice("PQ"))]) for _ in range(8)]

    def step(self) -> Iterator[tuple[Run, Call]]:
        """One random event; gives a call that was put into another run's trajectory."""
        run = self.random.choice(self.runs)
        if run.pending is None:
            yield from self.send(run)
        elif self.random.random() < 0.2:
            self.memory.failed(run.pending)
            run.pending, run.retries = None, run.retries + 1
        else:
            yield from self.answer(run, run.pending)

    def send(self, run: Run) -> Iterator[tuple[Run, Call]]:
        place = self.memory.place(url=None, headers={}, metadata=None, history=self.read(run.said))
        body = json.dumps(run.said)
        call = self.memory.begin(place, call_id="c", body_sha256=body, sdk_retry=run.retries)
        run.pending = call
        run.rules.append(call.place.attribution)
        if call.place.ambiguous:
            self.began_ambiguous.add(call.place.trajectory)
        if call.place.attribution == "prefix" and self.owners[call.place.trajectory] is not run:
            yield run, call

    def answer(self, run: Run, call: Call) -> Iterator[tuple[Run, Call]]:
        text = self.random.choice(self.answers)
        turns: list[Turn | End] = []
        history = self.read(run.said)
        if isinstance(history, Conversation):
            turns.append(history.answered({"content": text}))
        elif end := history.after_text(text):
            turns.append(end)
        self.memory.answered(call, turns)
        if self.owners.setdefault(call.place.trajectory, run) is not run:
            yield run, call
        run.pending, run.retries = None, 0
        branch = len(run.said) > 1 and self.random.random() < 0.2
        if not branch:
            run.said += [("assistant", text), ("user", self.random.choice(self.notes))]
        else:  # the answer is thrown away, and the last note is another one
            run.said[-1] = ("user", self.random.choice(self.notes))


def chat(said: Said) -> Conversation:
    messages = [{"role": role, "content": text} for role, text in said]
    conversation = read_conversation(json.dumps(messages).encode())
    assert conversation is not None
    return conversation


def text(said: Said) -> Prompt:
    return Prompt.of_text("".join(part for _, part in said))


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32))
def test_chats(seed: int) -> None:
    simulation = Simulation(seed, chat, answers=["a", "b", "<think>x</think>a"], notes=["a", "n"])
    assert [wrong for _ in range(300) for wrong in simulation.step()] == []


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32))
def test_texts_whose_notes_are_no_answers(seed: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompts, "BLOCK_BYTES", 4)
        simulation = Simulation(seed, text, answers=["a", "ab", "abb"], notes=["N", "M\n"])
        assert [wrong for _ in range(300) for wrong in simulation.step()] == []


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32))
def test_texts_whose_notes_look_like_answers(seed: int) -> None:
    """Only a trajectory that says itself that it may be another's can get another's call."""
    simulation = Simulation(seed, text, answers=["a", "ab", "b"], notes=["", "a", "b"])
    wrong = [call for _ in range(300) for _, call in simulation.step()]
    assert [c for c in wrong if c.place.trajectory not in simulation.began_ambiguous] == []


@pytest.mark.parametrize("read", [chat, text])
def test_runs_that_differ_are_followed_to_the_end(
    read: Callable[[Said], Conversation | Prompt],
) -> None:
    many = [f"answer {number}." for number in range(10**6)]
    simulation = Simulation(1, read, answers=many, notes=["n", "m"])
    assert [wrong for _ in range(600) for wrong in simulation.step()] == []
    for run in simulation.runs:
        followed = run.rules[run.rules.index("prefix") :]
        assert len(followed) > 5
        assert set(followed) == {"prefix"}
