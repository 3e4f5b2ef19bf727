"""An agent's calls with the tokens that a real tokenizer and chat template make of them.

What is sampled is given as text; the message that an engine's parsers make of it comes back, and
the next prompt is what the template renders of the messages that the test sends.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from driftgate.testing.checkpoints import CHAT_TEMPLATE
from driftgate.testing.traces import ENGINE
from driftgate.trace import I32, Agent, Proof, Sampling, Trace, TraceMeta
from driftgate.tree import Node, Tree, build_tree

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FORGETFUL = CHAT_TEMPLATE.replace(
    "{%- for message in messages %}\n",
    "{%- set asked = namespace(last=0) %}\n"
    "{%- for message in messages if message.role == 'user' %}"
    "{%- set asked.last = messages.index(message) %}{%- endfor %}\n"
    "{%- for message in messages %}\n",
    1,
).replace(
    "{{- '<|im_start|>assistant\\n' + content }}",
    "{%- set kept = message.reasoning and loop.index0 > asked.last %}\n"
    "{{- '<|im_start|>assistant\\n' }}\n"
    "{%- if kept %}{{- '<think>' + message.reasoning + '</think>' }}{%- endif %}\n"
    "{{- content }}",
)
"""As Qwen3's: the reasoning of answers before the last question of the user is left out."""

UNTHINKING = CHAT_TEMPLATE.replace(
    "{{- '<|im_start|>assistant\\n' }}\n{%- endif %}\n",
    "{{- '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' }}\n{%- endif %}\n",
)
"""As Qwen3's with ``enable_thinking`` off: empty reasoning before each answer, none in history."""

SYSTEM = {"role": "system", "content": "You are a careful agent."}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}
    for name in ("read", "write")
]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def tool(text: str, call: str = "call-0") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call, "content": text}


def parsed(sampled: str) -> dict[str, Any]:
    """As vLLM's reasoning and hermes parsers give it."""
    thought, _, rest = sampled.rpartition("</think>")
    calls = re.findall(r"<tool_call>\s*(.*?)\s*</tool_call>", rest, re.DOTALL)
    content = rest.partition("<tool_call>")[0]
    message: dict[str, Any] = {"role": "assistant", "content": content or None}
    if thought:
        message["reasoning"] = thought.removeprefix("<think>")
    if calls:
        message["tool_calls"] = [
            {
                "id": f"call-{index}",
                "type": "function",
                "function": {
                    "name": (call := json.loads(text))["name"],
                    "arguments": json.dumps(call["arguments"]),
                },
            }
            for index, text in enumerate(calls)
        ]
    return message


class Run:
    """One trajectory; ``ask`` adds a call to it."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, template: str = CHAT_TEMPLATE) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.traces: list[Trace] = []

    def ask(
        self,
        messages: list[dict[str, Any]],
        sampled: str,
        *,
        tools: list[dict[str, Any]] | None = None,
        end: str = "<|im_end|>",
        choices: tuple[str, ...] = (),
        beside: bool = False,
        **meta: Any,
    ) -> dict[str, Any]:
        """The message that came back. ``end``: the stop token; empty where max_tokens cut it.

        ``beside``: begin while the call before is under way. ``meta``: fields of the trace's."""
        request: dict[str, Any] = {"model": meta.get("model", ENGINE.model), "messages": messages}
        if tools is not None:
            request["tools"] = tools
        prompt = self.render(messages, tools)
        step = meta.pop("step", len({trace.meta.step for trace in self.traces}))
        retry = meta.pop("retry", 0)
        for choice, text in enumerate((sampled, *choices)):
            self.traces.append(
                self._trace(request, prompt, text, end, step, choice, retry, beside, meta)
            )
        return parsed(sampled)

    def render(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> I32:
        """vLLM too gives templates a tool call's arguments as an object, not as a text."""
        given = json.loads(json.dumps(messages))
        for message in given:
            for call in message.get("tool_calls") or ():
                call["function"]["arguments"] = json.loads(call["function"]["arguments"])
        text = self.tokenizer.apply_chat_template(
            given,
            tools=tools,
            chat_template=self.template,
            add_generation_prompt=True,
            tokenize=False,
        )
        return self.ids(str(text))

    def ids(self, text: str) -> I32:
        return np.array(self.tokenizer.encode(text), np.int32)

    def _trace(
        self,
        request: dict[str, Any],
        prompt: I32,
        text: str,
        end: str,
        step: int,
        choice: int,
        retry: int,
        beside: bool,
        meta: dict[str, Any],
    ) -> Trace:
        response = meta.get("sampled_ids") or self.ids(text + end).tolist()
        texts = [self.tokenizer.decode([token]).encode() for token in response]
        start = 1000 * step + 100 * retry
        call = f"c{step}" + (f"-{retry}" if retry else "")
        fields: dict[str, Any] = {
            "model": ENGINE.model,
            "started_ns": start - (1000 if beside else 0),
            "ended_ns": start + (900 if beside else 500),
            "finish_reason": "stop" if end else "length",
        }
        fields |= {key: value for key, value in meta.items() if key != "sampled_ids"}
        return Trace(
            meta=TraceMeta(
                trace_id=f"{call}.{choice}", call_id=call, trajectory="run", step=step,
                choice=choice, api="chat", attribution="header", engine=ENGINE, retry=retry,
                sampling=Sampling(), streamed=False, proof=Proof(terminal=True), **fields,
            ),
            prompt_ids=prompt,
            response_ids=np.array(response, np.int32),
            logprobs=np.full(len(response), -1.0, np.float32),
            routes=None,
            token_bytes=b"".join(texts),
            token_offsets=np.cumsum([0, *map(len, texts)], dtype=np.int32),
            request=json.dumps(request).encode(),
            response=msgspec.json.encode({"index": choice, "message": parsed(text)}),
        )  # fmt: skip

    def tree(self) -> Tree:
        by_id = {trace.meta.trace_id: trace for trace in self.traces}
        return build_tree("run", [trace.meta for trace in self.traces], by_id.__getitem__)

    def last(self) -> Node:
        return self.tree().nodes[-1]

    def cause(self) -> str:
        """Why the last call's prefix broke."""
        node = self.last()
        assert node.broken is not None, node
        return node.broken.reasons[0].code


def agent(name: str, parent: str | None = None, **fields: Any) -> Agent:
    return Agent(id=name, parent=parent, **fields)
