"""Spans of calls: their content, their place in the agent's trace, and what never is in them."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from driftgate.gateway.telemetry import Spans, from_environment, wanted

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"
CHAT = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "a secret prompt"}],
    "temperature": 0.5,
    "max_tokens": 4,
}


@pytest.fixture
def memory() -> Iterator[tuple[TracerProvider, InMemorySpanExporter]]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    yield provider, exporter
    provider.shutdown()


@pytest.fixture
async def traced(agent: Any, memory: tuple[TracerProvider, InMemorySpanExporter]) -> Any:
    agent.gateway.proxy.spans = Spans(memory[0])
    return agent


async def spans_of(agent: Any, exporter: InMemorySpanExporter) -> list[ReadableSpan]:
    await agent.flush()
    return list(exporter.get_finished_spans())


async def test_a_call_is_a_client_span_in_the_words_of_the_conventions(
    traced: Any, memory: tuple[TracerProvider, InMemorySpanExporter]
) -> None:
    await traced.send(CHAT | {"n": 2}, headers={"x-driftgate-trajectory": "run-17"})
    (trace, other) = await traced.traces()
    (span,) = await spans_of(traced, memory[1])
    assert (span.name, span.kind) == ("chat tiny", SpanKind.CLIENT)
    said = dict(span.attributes or {})
    assert said["gen_ai.operation.name"] == "chat"
    assert said["gen_ai.provider.name"] == "vllm"
    assert said["gen_ai.request.model"] == "tiny"
    assert said["gen_ai.request.temperature"] == 0.5
    assert said["gen_ai.request.choice.count"] == 2
    assert said["gen_ai.conversation.id"] == "run-17"
    assert said["gen_ai.usage.input_tokens"] == len(trace.prompt_ids)
    assert said["gen_ai.usage.output_tokens"] == len(trace.response_ids) + len(other.response_ids)
    assert said["gen_ai.response.finish_reasons"] == ("length", "length")
    assert said["driftgate.call_id"] == trace.meta.call_id
    assert said["driftgate.outcome"] == "answered"
    assert said["driftgate.missing"] == ()
    assert span.start_time == trace.meta.started_ns
    assert span.end_time is not None
    assert span.end_time >= trace.meta.ended_ns
    assert span.status.status_code is StatusCode.UNSET


async def test_agent_gateway_and_engine_are_one_trace(
    traced: Any, memory: tuple[TracerProvider, InMemorySpanExporter]
) -> None:
    await traced.send(CHAT | {"stream": True}, headers={"traceparent": TRACEPARENT})
    (span,) = await spans_of(traced, memory[1])
    assert span.context is not None
    assert span.parent is not None
    assert f"{span.context.trace_id:032x}" == TRACE
    assert f"{span.parent.span_id:016x}" == PARENT
    sent = traced.engine.headers[-1].getall("traceparent")
    assert sent == [f"00-{TRACE}-{span.context.span_id:016x}-01"]
    first_chunk_s = (span.attributes or {})["gen_ai.response.time_to_first_chunk"]
    assert isinstance(first_chunk_s, float)
    assert first_chunk_s > 0


async def test_without_spans_the_traceparent_passes_as_it_came(agent: Any) -> None:
    assert agent.gateway.proxy.spans is None
    await agent.send(CHAT, headers={"traceparent": TRACEPARENT, "tracestate": "a=1"})
    assert agent.engine.headers[-1].getall("traceparent") == [TRACEPARENT]
    assert agent.engine.headers[-1]["tracestate"] == "a=1"


async def test_a_refused_call_is_an_error_and_its_span_ends(
    traced: Any, memory: tuple[TracerProvider, InMemorySpanExporter]
) -> None:
    traced.engine.status = 503
    await traced.send(CHAT)
    (span,) = await spans_of(traced, memory[1])
    assert span.status.status_code is StatusCode.ERROR
    assert (span.attributes or {})["error.type"] == "engine_error"


async def test_no_text_and_no_key_is_in_a_span(
    traced: Any, memory: tuple[TracerProvider, InMemorySpanExporter]
) -> None:
    await traced.send(CHAT, headers={"Authorization": "Bearer sk-very-private"})
    (trace,) = await traced.traces()
    (span,) = await spans_of(traced, memory[1])
    text = span.to_json()
    assert "secret prompt" not in text
    assert "very-private" not in text
    assert trace.token_bytes.decode() not in text


async def test_the_standard_environment_sends_spans_over_otlp(
    connect: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    came: asyncio.Queue[bytes] = asyncio.Queue()

    async def take(request: web.Request) -> web.Response:
        await came.put(await request.read())
        return web.Response(content_type="application/x-protobuf")

    collector = web.Application()
    collector.router.add_post("/v1/traces", take)
    runner = web.AppRunner(collector)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    port = runner.addresses[0][1]
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "rollouts")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    agent = await connect()
    await agent.send(CHAT)
    body = await asyncio.wait_for(came.get(), 30)
    (resource,) = ExportTraceServiceRequest.FromString(body).resource_spans
    names = {pair.key: pair.value.string_value for pair in resource.resource.attributes}
    assert names["service.name"] == "rollouts"
    assert [span.name for scope in resource.scope_spans for span in scope.spans] == ["chat tiny"]
    await asyncio.to_thread(agent.gateway.proxy.spans.close)
    await runner.cleanup()


@pytest.mark.parametrize(
    ("environment", "asks"),
    [
        ({}, False),
        ({"OTEL_SERVICE_NAME": "x"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"}, True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318", "OTEL_TRACES_EXPORTER": "none"}, False),
        ({"OTEL_TRACES_EXPORTER": "console", "OTEL_SDK_DISABLED": "true"}, False),
        ({"OTEL_TRACES_EXPORTER": "console"}, True),
    ],
)
def test_only_the_standard_variables_ask_for_spans(environment: dict[str, str], asks: bool) -> None:
    assert wanted(environment) is asks


def test_an_exporter_that_is_not_there_is_a_warning_with_a_remedy(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert from_environment({"OTEL_TRACES_EXPORTER": "nowhere"}) is None
    assert "pip install 'driftgate[otel]'" in caplog.text


def test_opentelemetry_is_not_imported_unless_asked_for() -> None:
    code = (
        "import sys; from driftgate.gateway.app import create_app;"
        "from driftgate.gateway.config import GatewayConfig;"
        "create_app(GatewayConfig(upstream='http://e:1'), sink=object());"
        "sys.exit(any(name.startswith('opentelemetry') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
