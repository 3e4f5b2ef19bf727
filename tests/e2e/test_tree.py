"""The tree of an agent on a real engine: what extends, what breaks and why, who called whom."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from openai import AsyncOpenAI

from driftgate.gateway.api_tree import read_tree
from driftgate.storage import Reader
from driftgate.testing.engine import EngineProcess
from tests.e2e.support import driftgate, proxy, stored_traces

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

THINKS: dict[str, Any] = {
    "structured_outputs": {"regex": r"<think>( [a-z]{2,9}){4,6}</think>( [a-z]{2,9}){8,12}"}
}
"""A random model thinks only where a grammar makes it."""

MAIN = {"x-session-id": "main"}
HELPER = {"x-session-id": "helper", "x-parent-session-id": "main"}


class Talk:
    """One conversation, on the OpenAI SDK."""

    def __init__(self, client: AsyncOpenAI, model: str, headers: dict[str, str]) -> None:
        self.client, self.model, self.headers = client, model, headers
        self.messages: list[Any] = [{"role": "system", "content": f"You are {headers}."}]

    async def ask(self, text: str, *, keep: bool = True, n: int = 1, **extra: Any) -> None:
        """``keep``: send the answer back as it came, with its reasoning."""
        self.messages.append({"role": "user", "content": text})
        answer = await self.client.chat.completions.create(
            model=self.model, messages=self.messages, n=n, seed=len(self.messages), temperature=1.0,
            max_tokens=96, extra_headers=self.headers, extra_body=extra,
        )  # fmt: skip
        said = answer.choices[0].message.content or ""
        kept = said if keep else said.rpartition("</think>")[2]
        self.messages.append({"role": "assistant", "content": kept})


async def work(url: str, model: str) -> None:
    """Turns of a main agent, a helper's between them, an answer that is sampled twice; then the
    main agent goes on without the reasoning of its answers."""
    async with AsyncOpenAI(base_url=url, api_key="none") as client:
        main, helper = Talk(client, model, MAIN), Talk(client, model, HELPER)
        for turn in range(4):
            await main.ask(f"What is next after {turn}?")
        for turn in range(2):
            await helper.ask(f"Look into {turn} for me.")
        await main.ask("What would you choose?", n=2)
        for turn in range(3):
            await main.ask(f"Think about {turn}.", keep=False, **THINKS)
        await main.ask("So what?")


async def test_an_agent_that_drops_its_reasoning_is_told_so(
    engines: dict[str, EngineProcess], tmp_path: Path
) -> None:
    async with proxy(engines["dense"], tmp_path) as proxied:
        await work(f"{proxied.url}/t/run/v1", proxied.engine.model)
    with closing(Reader(tmp_path)) as reader:
        tree = read_tree(reader, "run")
    nodes = {node.trace_id: node for node in tree.nodes}
    kinds = [node.kind for node in tree.nodes]
    extends, breaks = ["extension"], ["broken"]
    assert kinds == ["root", *extends * 3, "sub_agent", *extends, *extends, "choice", *extends] + (
        breaks * 3
    )
    assert tree.breaks == {"reasoning_dropped": 3}
    helper = tree.nodes[4]
    assert helper.after == tree.nodes[3].trace_id
    traces = {trace.meta.trace_id: trace for trace in stored_traces(tmp_path, "run")}
    for node in tree.nodes[-3:]:
        assert node.broken is not None
        assert node.after is not None
        before = traces[node.after]
        assert before.prompt_ids is not None
        assert node.broken.position == len(before.prompt_ids)
        assert nodes[node.after].step == node.step - 1
        assert node.broken.was.startswith("<think>")
    shown = driftgate("show", "run", "--store", tmp_path).stdout
    assert "! reasoning_dropped ×3: send `reasoning` back" in shown
    print(shown)
