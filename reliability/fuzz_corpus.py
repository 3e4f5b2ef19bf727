"""What a fuzz run begins with: answers, streams and requests in small, and the golden segment."""

from __future__ import annotations

import base64
import io
from itertools import accumulate
from pathlib import Path

import msgspec
import numpy as np

from driftgate.storage.codec import HEADER_BYTES, MARKER, parse_header, unpack_frame

__all__ = [
    "MESSAGES",
    "REQUEST",
    "RESPONSES",
    "answers",
    "npy",
    "payloads",
    "records",
    "routes",
    "segments",
    "stream",
]

GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "golden"

ANSWER: dict[str, object] = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "model": "tiny",
    "system_fingerprint": "vllm-0.29.0-tp1-abc",
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "hé", "tool_calls": []},
            "logprobs": {
                "content": [
                    {"token": "h", "logprob": -0.5, "bytes": [104], "top_logprobs": []},
                    {"token": "é", "logprob": -1.25, "bytes": [195, 169], "top_logprobs": []},
                ]
            },
            "finish_reason": "stop",
            "token_ids": [7, 8],
            "routed_experts": None,
        }
    ],
    "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
    "prompt_token_ids": [1, 2, 3],
}

REQUEST: dict[str, object] = {
    "model": "tiny",
    "messages": [
        {"role": "system", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "u"}]},
        {"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "f"}}]},
        {"role": "tool", "tool_call_id": "c", "content": "4"},
    ],
    "temperature": 0.7,
    "n": 2,
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
    "stream_options": {"include_usage": True},
    "seed": 1,
}


RESPONSES: dict[str, object] = {
    "model": "tiny",
    "instructions": "s",
    "input": [
        {"role": "user", "content": [{"type": "input_text", "text": "u"}]},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "4"},
    ],
    "tools": [{"type": "function", "name": "f", "parameters": {}, "strict": True}],
    "max_output_tokens": 9,
    "stream": True,
}

TOOL_USE = {"type": "tool_use", "id": "c", "name": "f", "input": {}}

MESSAGES: dict[str, object] = {
    "model": "tiny",
    "max_tokens": 9,
    "system": [{"type": "text", "text": "s"}],
    "messages": [
        {"role": "user", "content": "u"},
        {
            "role": "assistant",
            "content": [{"type": "tool_use", "id": "c", "name": "f", "input": {}}],
        },
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": "4"}]},
    ],
    "tools": [{"name": "f", "input_schema": {}}],
    "stop_sequences": ["x"],
}


def npy(array: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> bytes:
    """An array as a file."""
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def routes() -> str:
    """Of a prompt of three tokens and two that were sampled."""
    return base64.b64encode(npy(np.arange(16, dtype=np.uint8).reshape(4, 2, 2))).decode()


def answers() -> list[bytes]:
    """Of chat, of a mixture of experts, of completions, and an error."""
    moe = msgspec.json.decode(msgspec.json.encode(ANSWER), type=dict[str, object])
    moe["choices"][0]["routed_experts"] = routes()  # type: ignore[index]
    text = {
        "object": "text_completion",
        "choices": [
            {
                "index": 0,
                "text": "ab",
                "prompt_token_ids": [1, 2],
                "token_ids": [3, 4],
                "logprobs": {
                    "tokens": ["a", "b"],
                    "token_logprobs": [-1.0, -2.0],
                    "text_offset": [0, 1],
                    "top_logprobs": [None, None],
                },
                "finish_reason": "length",
            }
        ],
    }
    return [msgspec.json.encode(one) for one in (ANSWER, moe, text, {"error": {"message": "no"}})]


def stream() -> bytes:
    """A stream in vLLM's usual form, with what may come between and after."""
    rows = [{"token": "h", "logprob": -0.5, "bytes": [104], "top_logprobs": []}]
    start: dict[str, object] = {"id": "c", "object": "chat.completion.chunk", "model": "tiny"}
    deltas: list[dict[str, object]] = [{"content": "h"}, {"reasoning": "h"}, {"content": "h"}]
    usual = [
        {
            "index": 0,
            "delta": delta,
            "logprobs": {"content": rows},
            "finish_reason": None,
            "token_ids": [7],
        }
        for delta in deltas
    ]
    chunks = [
        start | {"prompt_token_ids": [1, 2, 3], "choices": []},
        *(start | {"choices": [choice]} for choice in usual),
        start | {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
        {"choices": [], "usage": ANSWER["usage"]},
        {"driftgate": 1, "choices": [{"index": 0, "routed_experts": routes()}]},
    ]
    events = [b"data: " + msgspec.json.encode(chunk) + b"\n\n" for chunk in chunks]
    return b"".join([b": ping\r\n\r\n", *events, b"data: [DONE]\n\n"])


def golden() -> bytes:
    """A segment of the newest version."""
    (path,) = sorted(GOLDEN.glob("format-v*.dgs"))[-1:]
    return path.read_bytes()


def records() -> list[bytes]:
    """The records of the golden file."""
    data = golden()
    starts = [at for at in range(len(data)) if data.startswith(MARKER, at)]
    return [data[a:b] for a, b in zip(starts, [*starts[1:], len(data)], strict=True)]


def payloads() -> list[bytes]:
    """What those hold."""
    found = []
    for one in records():
        header = parse_header(one)
        assert header is not None
        found.append(unpack_frame(header, one[HEADER_BYTES:]))
    return found


def segments() -> list[bytes]:
    """One record, two and four."""
    parts = records()
    return [b"".join(parts[:count]) for count in accumulate([1, 1, 2])]
