"""One trace from the agent through the gateway into a real vLLM, over OTLP."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from driftgate.testing.engine import EngineProcess
from tests.e2e.collector import Collector
from tests.e2e.support import proxy

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
WAIT_S = 30.0
"""vLLM exports every five seconds."""


async def test_agent_gateway_and_vllm_are_one_trace(
    thinking_engine: EngineProcess,
    collector: Collector,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    payload = {
        "model": thinking_engine.model,
        "messages": [{"role": "user", "content": "a"}],
        "max_tokens": 4,
    }
    async with proxy(thinking_engine, tmp_path) as proxied:
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
        url = f"{proxied.url}/t/traced/v1/chat/completions"
        async with proxied.http.post(url, json=payload, headers=headers) as answer:
            assert answer.status == 200
        spans = await asyncio.to_thread(collector.of_trace, TRACE, spans=2, timeout_s=WAIT_S)
        (trace,) = proxied.traces("traced")
    ours = next(span for span in spans if span.name == f"chat {payload['model']}")
    (engines, *_) = [span for span in spans if span is not ours]
    assert ours.parent_span_id.hex() == PARENT
    assert engines.parent_span_id == ours.span_id
    said = {pair.key: pair.value for pair in engines.attributes}
    assert trace.response_ids is not None
    assert said["gen_ai.usage.completion_tokens"].int_value == len(trace.response_ids)
