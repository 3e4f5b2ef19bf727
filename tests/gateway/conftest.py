"""A stand-in engine that answers as vLLM 0.29 does, over real sockets, and a gateway before it.

Shapes and nulls follow vLLM's ``entrypoints/openai/{chat_completion,completion}/serving.py``; the
end-to-end tests hold the same comparisons against the real engine.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import random
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
from aiohttp import web

from driftgate.gateway.app import GATEWAY, Gateway, create_app
from driftgate.gateway.config import GatewayConfig
from driftgate.gateway.listen import listening
from driftgate.gateway.numerics import PROMPT
from driftgate.trace import CallOutcome, Trace

VOCABULARY = ["Hel", "lo", " wor", "ld", "!", " é", "…", " 1.50", '"', "\n"]
FIRST_ID = 1000
END = 10
LAYERS, TOP_K = 2, 2


def dump(value: Any) -> bytes:
    """Compact JSON, with one number spelled as no encoder would."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    return text.replace('"@number@"', "1.50").encode()


def npy(array: np.ndarray[Any, Any]) -> str:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return base64.b64encode(file.getvalue()).decode()


class StandIn:
    """One engine; tests set its attributes."""

    def __init__(self) -> None:
        self.url = ""
        self.routes = False
        self.plugin = False
        self.fingerprint = "vllm-0.29.0-standin"
        self.logprobs_scale: Callable[[float], float] = lambda temperature: 1.0
        self.tokens = 5
        self.status: int | None = None
        self.cut_after: int | None = None
        """Close the connection after so many events."""
        self.error_after: int | None = None
        """Put an error event in place of the rest of a stream, as vLLM does."""
        self.hold: asyncio.Event | None = None
        """Wait for it before event ``hold_at``, or before a JSON answer."""
        self.hold_at = 1
        self.weight_version: str | None = None
        self.silent_looks = 0
        """So many requests for ``/health`` get no answer."""
        self.cards = [{"id": "tiny", "owned_by": "vllm", "root": "/nowhere", "max_model_len": 4096}]
        """Of ``/v1/models``."""
        self.system_first = False
        """Its template refuses a system message behind the first message."""
        self.limit: int | None = None
        """Tokens of prompt and answer; a chat request over it is refused."""
        self.runner: web.AppRunner
        self.came = asyncio.Event()
        """A call that is not a probe has come."""
        self.left = asyncio.Event()
        """A client went away while an answer was made."""
        self.bodies: list[bytes] = []
        self.headers: list[Any] = []
        self.takes_ids = True
        """For the prompt of a chat call, as vLLM 0.29."""
        self.retokenises = False
        """Its template gives other tokens than were sampled."""
        self.ends = False
        """Answers end with the token that its template ends turns with."""
        self.render_status = 200
        self.rendered = 0
        """How often it was asked to render only."""
        self._sampled: dict[str, list[int]] = {}

    @property
    def asked(self) -> dict[str, Any]:
        """The last request that was not a probe's."""
        return dict(json.loads(self.bodies[-1]))

    # What it samples.

    def render(self, messages: list[dict[str, Any]]) -> list[int]:
        ids: list[int] = []
        if self.system_first and any(message["role"] == "system" for message in messages[1:]):
            raise web.HTTPBadRequest(text='{"message": "System message must be at the beginning."}')
        for message in messages:
            text = str(message.get("content")) + str(message.get("tool_calls") or "")
            known = None if self.retokenises else self._sampled.get(text)
            ids += [ord(message["role"][0]), *(known or text.encode()), END]
        return [*ids, ord("a")]

    def prompt(self, body: dict[str, Any]) -> list[int]:
        given: list[int] | None = (body.get("kv_transfer_params") or {}).get("prompt_token_ids")
        return given if given and self.takes_ids else self.render(body["messages"])

    def sample(self, body: dict[str, Any], choice: int) -> tuple[list[int], list[str], list[float]]:
        source = random.Random(
            f"{body.get('seed')}|{body.get('messages')}|{body.get('prompt')}|{choice}"
        )
        picked = [
            source.randrange(len(VOCABULARY)) for _ in range(body.get("max_tokens") or self.tokens)
        ]
        texts = [VOCABULARY[i] for i in picked]
        ids = [FIRST_ID + i for i in picked]
        if self.ends:
            ids, texts, picked = [*ids, END], [*texts, ""], [*picked, END]
        self._sampled["".join(texts)] = ids
        return ids, texts, [-source.random() * 3 for _ in picked]

    def route(self, rows: int) -> np.ndarray[Any, Any]:
        return np.arange(rows * LAYERS * TOP_K, dtype=np.uint8).reshape(rows, LAYERS, TOP_K) % 16

    # Chat.

    def chat_logprobs(self, body: dict[str, Any], texts: list[str], values: list[float]) -> Any:
        if not body.get("logprobs") or body.get("top_logprobs", 0) is None:
            return None
        scale = self.logprobs_scale(body.get("temperature", 1.0))
        rows = []
        for text, value in zip(texts, values, strict=True):
            top = [
                {"token": t, "logprob": v * scale, "bytes": list(t.encode())}
                for t, v in (("a", -0.5), ("b", -1.5), ("c", -2.5))
            ]
            rows.append(
                {
                    "token": text,
                    "logprob": value,
                    "bytes": list(text.encode()),
                    "top_logprobs": top[: body.get("top_logprobs", 0)],
                }
            )
        return {"content": rows}

    def message(self, body: dict[str, Any], text: str, choice: int) -> dict[str, Any]:
        message: dict[str, Any] = {
            "role": "assistant", "content": text, "refusal": None, "annotations": None,
            "audio": None, "function_call": None, "reasoning": None,
        }  # fmt: skip
        if body.get("tools"):
            message["content"] = None
            message["tool_calls"] = [self.tool_call(text, choice)]
        return message

    def tool_call(self, text: str, choice: int) -> dict[str, Any]:
        arguments = json.dumps({"text": text})
        function = {"name": "echo", "arguments": arguments}
        return {"id": f"call-{choice}", "type": "function", "function": function}

    def chat_answer(self, body: dict[str, Any]) -> bytes:
        prompt = self.prompt(body)
        choices, total = [], 0
        for index in range(body.get("n") or 1):
            ids, texts, values = self.sample(body, index)
            total += len(ids)
            rows = len(prompt) + len(ids) - 1
            choices.append(
                {
                    "index": index,
                    "message": self.message(body, "".join(texts), index),
                    "logprobs": self.chat_logprobs(body, texts, values),
                    "finish_reason": "tool_calls" if body.get("tools") else "length",
                    "stop_reason": None,
                    "token_ids": ids if body.get("return_token_ids") else None,
                    "routed_experts": npy(self.route(rows)) if self.routes else None,
                }
            )
        return dump(
            {
                "id": "chatcmpl-1", "object": "chat.completion", "created": 7,
                "model": body["model"], "choices": choices, "service_tier": None,
                "system_fingerprint": self.fingerprint,
                "usage": self.usage(len(prompt), total),
                "prompt_logprobs": self.prompt_logprobs(body, prompt),
                "prompt_token_ids": prompt if body.get("return_token_ids") else None,
                "prompt_text": None, "kv_transfer_params": None, "metrics": {"x": "@number@"},
            }
        )  # fmt: skip

    def prompt_logprobs(self, body: dict[str, Any], prompt: list[int]) -> Any:
        """With echo vLLM takes ``top_logprobs``, which is 0 where it was not sent."""
        asked = body.get("prompt_logprobs")
        if asked is None and body.get("echo"):
            asked = body.get("top_logprobs", 0)
        rows = [{str(token): {"logprob": -1.5, "rank": 3}} for token in prompt[1:]]
        return None if asked is None else [None, *rows]

    def usage(self, prompt: int, completion: int) -> dict[str, Any]:
        total = prompt + completion
        return {"prompt_tokens": prompt, "total_tokens": total, "completion_tokens": completion}

    def chat_events(self, body: dict[str, Any]) -> list[bytes]:
        prompt = self.prompt(body)
        head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 7}
        head["model"] = body["model"]
        with_ids = body.get("return_token_ids")
        usage = (body.get("stream_options") or {}).get("include_usage")
        chunks: list[dict[str, Any]] = []
        n = body.get("n") or 1
        for index in range(n):
            first = {"index": index, "delta": {"role": "assistant", "content": ""}}
            first |= {"logprobs": None, "finish_reason": None}
            extra = {"prompt_token_ids": prompt if with_ids else None, "prompt_text": None}
            chunks.append(head | {"choices": [first]} | extra)
        samples = [self.sample(body, index) for index in range(n)]
        for position in range(len(samples[0][0])):
            for index, (ids, texts, values) in enumerate(samples):
                delta = self.delta(body, texts, position, index)
                last = position == len(ids) - 1
                if delta is None and not last and not with_ids:
                    continue
                choice = {
                    "index": index,
                    "delta": delta or {},
                    "logprobs": self.chat_logprobs(
                        body, texts[position : position + 1], values[position : position + 1]
                    ),
                    "finish_reason": None,
                    "token_ids": [ids[position]] if with_ids else None,
                }
                chunk = head | {"choices": [choice]}
                if last:
                    choice["finish_reason"] = "tool_calls" if body.get("tools") else "length"
                    choice["stop_reason"] = None
                    if not usage:
                        chunk["system_fingerprint"] = self.fingerprint
                chunks.append(chunk)
        if usage:
            counts = self.usage(len(prompt), sum(len(s[0]) for s in samples))
            chunks.append(
                head | {"choices": [], "usage": counts} | {"system_fingerprint": self.fingerprint}
            )
        if self.routes and self.plugin and body.get("driftgate_routes"):
            chunks.append(
                head
                | {
                    "choices": [
                        {"index": i, "routed_experts": npy(self.route(len(prompt) + len(s[0]) - 1))}
                        for i, s in enumerate(samples)
                    ],
                    "driftgate": "routed_experts",
                }
            )
        return [b"data: " + dump(chunk) + b"\n\n" for chunk in chunks]

    def delta(
        self, body: dict[str, Any], texts: list[str], position: int, choice: int
    ) -> dict[str, Any] | None:
        """None where a tool parser holds the text back."""
        if not body.get("tools"):
            return {"content": texts[position]}
        call = self.tool_call("".join(texts), choice)
        if position == 1:
            function = {"name": call["function"]["name"], "arguments": ""}
            return {"tool_calls": [{**call, "index": 0, "function": function}]}
        if position == len(texts) - 1:
            return {
                "tool_calls": [
                    {"index": 0, "function": {"arguments": call["function"]["arguments"]}}
                ]
            }
        return None

    # Completions.

    def text_prompts(self, body: dict[str, Any]) -> list[list[int]]:
        prompt = body["prompt"]
        if isinstance(prompt, str):
            return [list(prompt.encode())]
        if isinstance(prompt[0], int):
            return [prompt]
        return [p if isinstance(p, list) else list(p.encode()) for p in prompt]

    def text_logprobs(self, body: dict[str, Any], texts: list[str], values: list[float]) -> Any:
        if body.get("logprobs") is None:
            return None
        top = [{t: v} if body["logprobs"] >= 0 else {} for t, v in zip(texts, values, strict=True)]
        offsets = [sum(map(len, texts[:i])) for i in range(len(texts))]
        return {
            "text_offset": offsets, "token_logprobs": values, "tokens": texts, "top_logprobs": top,
        }  # fmt: skip

    def text_choices(
        self, body: dict[str, Any]
    ) -> list[tuple[dict[str, Any], list[int], list[str]]]:
        out: list[tuple[dict[str, Any], list[int], list[str]]] = []
        for prompt in self.text_prompts(body):
            for _ in range(body.get("n") or 1):
                ids, texts, values = self.sample(body, len(out))
                with_ids = body.get("return_token_ids")
                choice = {
                    "index": len(out),
                    "text": "".join(texts),
                    "logprobs": self.text_logprobs(body, texts, values),
                    "finish_reason": "length",
                    "stop_reason": None,
                    "token_ids": ids if with_ids else None,
                    "prompt_logprobs": None,
                    "prompt_token_ids": prompt if with_ids else None,
                    "routed_experts": npy(self.route(len(prompt) + len(ids) - 1))
                    if self.routes
                    else None,
                }
                out.append((choice, ids, texts))
        return out

    def text_answer(self, body: dict[str, Any]) -> bytes:
        choices = self.text_choices(body)
        prompts = sum(map(len, self.text_prompts(body)))
        return dump(
            {
                "id": "cmpl-1", "object": "text_completion", "created": 7, "model": body["model"],
                "choices": [choice for choice, _, _ in choices], "service_tier": None,
                "system_fingerprint": self.fingerprint,
                "usage": self.usage(prompts, sum(len(ids) for _, ids, _ in choices)),
                "kv_transfer_params": None,
            }
        )  # fmt: skip

    def text_events(self, body: dict[str, Any]) -> list[bytes]:
        head = {"id": "cmpl-1", "object": "text_completion", "created": 7, "model": body["model"]}
        chunks = []
        for whole, ids, texts in self.text_choices(body):
            for position, text in enumerate(texts):
                logprobs = whole["logprobs"]
                last = position == len(texts) - 1
                choice = {
                    "index": whole["index"],
                    "text": text,
                    "logprobs": logprobs
                    and {
                        name: values[position : position + 1] for name, values in logprobs.items()
                    },
                    "finish_reason": "length" if last else None,
                    "stop_reason": None,
                    "prompt_token_ids": whole["prompt_token_ids"] if position == 0 else None,
                    "token_ids": ids[position : position + 1] if whole["token_ids"] else None,
                }
                chunk = head | {"choices": [choice]}
                chunks.append(chunk | ({"system_fingerprint": self.fingerprint} if last else {}))
        return [b"data: " + dump(chunk) + b"\n\n" for chunk in chunks]

    # Serving.

    async def generate(self, request: web.Request) -> web.StreamResponse:
        raw = await request.read()
        try:
            body = json.loads(raw)
        except ValueError:
            return self.error(400, "Invalid JSON")
        hold = None
        if not any(asked in raw.decode() for asked in ("Say something.", PROMPT)):  # probes
            hold = self.hold
            self.bodies.append(raw)
            self.came.set()
            self.headers.append(request.headers)
        if self.status is not None:
            return self.error(self.status, "the stand-in was told so")
        if body.get("model") != "tiny":
            return self.error(404, f"The model `{body.get('model')}` does not exist.")
        if (body.get("top_logprobs") or 0) > 0 and not body.get("logprobs"):
            return self.error(400, "when using `top_logprobs`, `logprobs` must be set to true.")
        if body.get("logprob_token_ids") and not (
            body.get("logprobs") or body.get("logprobs") == 0
        ):
            return self.error(400, "when using `logprob_token_ids`, `logprobs` must be set.")
        chat = request.path.endswith("chat/completions")
        if chat and self.limit and len(self.prompt(body)) + body["max_tokens"] > self.limit:
            return self.error(400, f"the model's maximum context length is {self.limit} tokens")
        try:
            if body.get("stream"):
                events = self.chat_events(body) if chat else self.text_events(body)
                if self.error_after is not None:
                    events[self.error_after :] = [b'data: {"error": {"message": "boom"}}\n\n']
                return await self.stream(request, [*events, b"data: [DONE]\n\n"], hold)
            if hold is not None:
                await hold.wait()
            answer = self.chat_answer(body) if chat else self.text_answer(body)
        except asyncio.CancelledError:
            self.left.set()
            raise
        return web.Response(
            body=answer, content_type="application/json", headers={"X-Engine": "yes"}
        )

    async def stream(
        self, request: web.Request, events: list[bytes], hold: asyncio.Event | None
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        for position, event in enumerate(events):
            if position == self.cut_after:
                assert request.transport is not None
                request.transport.close()
                return response
            if position == self.hold_at and hold is not None:
                await hold.wait()
            await response.write(event)
        return response

    def error(self, status: int, message: str) -> web.Response:
        error = {"message": message, "type": "BadRequestError", "param": None, "code": status}
        return web.json_response({"error": error}, status=status)

    async def tokenize(self, request: web.Request) -> web.Response:
        body = await request.json()
        if body.get("model") != "tiny":
            return self.error(404, f"The model `{body.get('model')}` does not exist.")
        ids = self.render(body["messages"])
        return web.json_response({"count": len(ids), "max_model_len": 4096, "tokens": ids})

    async def render_only(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.rendered += body["messages"][0]["content"] != "Say something."  # a probe's
        if self.render_status != 200:
            return self.error(self.render_status, "the stand-in was told so")
        return web.json_response({"token_ids": self.render(body["messages"])})

    async def models(self, _request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": self.cards})

    async def version(self, _request: web.Request) -> web.Response:
        return web.json_response({"version": "0.29.0"})

    async def health(self, _request: web.Request) -> web.Response:
        if self.silent_looks > 0:
            self.silent_looks -= 1
            await asyncio.Event().wait()
        return web.Response(status=200 if self.status is None else self.status)

    async def weight_info(self, _request: web.Request) -> web.Response:
        """As vLLM answers with VLLM_SERVER_DEV_MODE=1."""
        if self.weight_version is None:
            return self.error(404, "Not Found")
        return web.json_response({"weight_version": self.weight_version})

    async def update_weights(self, _request: web.Request) -> web.Response:
        raise AssertionError("an administration route was reached through the gateway")


async def start(app: web.Application) -> tuple[web.AppRunner, str]:
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.5)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    return runner, f"http://127.0.0.1:{runner.addresses[0][1]}"


TURNS_TO_CLOSE = 10
"""Of the loop: a connection that its client left while it was being accepted is taken up, read to
its end and closed within a few. Until then the server does not know it, and would not close it."""


@asynccontextmanager
async def standing_in() -> AsyncIterator[StandIn]:
    """An engine that serves."""
    stand_in = StandIn()
    app = web.Application()
    app.router.add_post("/v1/chat/completions", stand_in.generate)
    app.router.add_post("/v1/chat/completions/render", stand_in.render_only)
    app.router.add_post("/v1/completions", stand_in.generate)
    app.router.add_post("/tokenize", stand_in.tokenize)
    app.router.add_get("/v1/models", stand_in.models)
    app.router.add_get("/version", stand_in.version)
    app.router.add_get("/health", stand_in.health)
    app.router.add_get("/weight_info", stand_in.weight_info)
    app.router.add_route("*", "/update_weights", stand_in.update_weights)
    stand_in.runner, stand_in.url = await start(app)
    yield stand_in
    if stand_in.hold is not None:
        stand_in.hold.set()
    for _ in range(TURNS_TO_CLOSE):
        await asyncio.sleep(0)
    await stand_in.runner.cleanup()


@pytest.fixture
async def engine() -> AsyncIterator[StandIn]:
    async with standing_in() as stand_in:
        yield stand_in


class Agent:
    """Calls a gateway and looks into its store."""

    def __init__(
        self, gateway: Gateway, http: aiohttp.ClientSession, url: str, engine: StandIn
    ) -> None:
        self.gateway = gateway
        self.http = http
        self.url = url
        self.engine = engine

    async def send(
        self, body: dict[str, Any] | bytes, *, path: str = "/v1/chat/completions",
        direct: bool = False, headers: dict[str, str] | None = None,
    ) -> tuple[int, bytes]:  # fmt: skip
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        url = (self.engine.url if direct else self.url) + path
        sent = {"Content-Type": "application/json", **(headers or {})}
        async with self.http.post(url, data=raw, headers=sent) as answer:
            return answer.status, await answer.read()

    async def both(self, body: dict[str, Any], **options: Any) -> tuple[bytes, bytes]:
        """The same request, direct and through the gateway."""
        direct = await self.send(body, direct=True, **options)
        proxied = await self.send(body, **options)
        assert direct[0] == proxied[0]
        return direct[1], proxied[1]

    async def traces(self) -> list[Trace]:
        """Everything captured, in order of steps and choices."""
        reader = self.gateway.reader
        assert reader is not None
        await self.flush()
        rows = [
            row
            for trajectory in reversed(reader.trajectories(limit=500))
            for row in reader.traces(trajectory.trajectory)
        ]
        return [reader.trace(row.meta.trace_id) for row in rows]

    async def outcomes(self) -> list[CallOutcome]:
        reader = self.gateway.reader
        assert reader is not None
        await self.flush()
        calls = [
            c for t in reversed(reader.trajectories(limit=500)) for c in reader.calls(t.trajectory)
        ]
        return [call.outcome for call in calls if call.outcome is not None]

    async def flush(self) -> None:
        writer = self.gateway.sink
        await asyncio.to_thread(writer.flush, 10)  # type: ignore[attr-defined]


@pytest.fixture
async def connect(engine: StandIn, tmp_path: Path) -> AsyncIterator[Callable[..., Any]]:
    """Start a gateway before the stand-in: ``agent = await connect(durability="strict")``."""
    async with AsyncExitStack() as stack:

        async def connect(*, sink: Any = None, **settings: Any) -> Agent:
            known: dict[str, Any] = {"upstream": engine.url, "port": 0, "store": tmp_path / "store"}
            config = GatewayConfig(**(known | settings))
            app = create_app(config, sink=sink)
            url = await stack.enter_async_context(
                listening(app, config, shutdown_timeout_s=0.5, refused=lambda: None)
            )
            http = await stack.enter_async_context(aiohttp.ClientSession())
            return Agent(app[GATEWAY], http, url, engine)

        yield connect


@pytest.fixture
async def agent(connect: Callable[..., Any]) -> Agent:
    connected: Agent = await connect()
    return connected
