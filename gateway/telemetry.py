"""OpenTelemetry spans, one for each model call, in the words of its GenAI conventions.

Nothing of OpenTelemetry is imported until the environment asks for it by its own standard variables
(``OTEL_TRACES_EXPORTER``, ``OTEL_EXPORTER_OTLP_ENDPOINT``, …). A span belongs to the agent's trace
where the agent sent a ``traceparent``, and the engine gets the span as its parent. Without spans
the header passes as it came. Prompts, answers and credentials are never part of a span.

Conventions: https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-spans/ (in development there;
the names used are those of semantic-conventions 0.66b2).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from driftgate.gateway.capture import Folded
from driftgate.gateway.openai import Plan

if TYPE_CHECKING:
    from multidict import CIMultiDict, CIMultiDictProxy
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

    from driftgate.gateway.sessions import Call

__all__ = ["CallSpan", "Spans", "from_environment", "wanted"]

STOP_WAIT_S = 2.0
"""What is left is exported for no longer when the gateway stops: a collector that is away costs up
to 10 s a batch, and Docker kills after that."""

OPERATIONS = {"chat": "chat", "completions": "text_completion"}
"""``gen_ai.operation.name`` of each API."""

PROTOCOLS = {"http/protobuf": "otlp_proto_http", "grpc": "otlp_proto_grpc"}
"""``OTEL_EXPORTER_OTLP_PROTOCOL`` and the exporters' names for it."""

SETTINGS = (
    "temperature",
    "top_p",
    "top_k",
    "max_tokens",
    "seed",
    "presence_penalty",
    "frequency_penalty",
)
"""``gen_ai.request.…``, named as in ``trace.Sampling``."""

log = logging.getLogger("driftgate.telemetry")


def wanted(environment: Mapping[str, str]) -> bool:
    """The standard variables ask for spans."""
    if environment.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return False
    if exporter := environment.get("OTEL_TRACES_EXPORTER"):
        return exporter != "none"
    endpoints = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    return any(environment.get(name) for name in endpoints)


def from_environment(environment: Mapping[str, str]) -> Spans | None:
    """Spans to where ``environment`` says; None where it does not ask for any.

    None with a warning where they cannot be had: such variables are often set for a whole cluster,
    and calls matter more.
    """
    if not wanted(environment):
        return None
    name = environment.get("OTEL_TRACES_EXPORTER", "otlp")
    if name == "otlp":
        protocol = environment.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or environment.get(
            "OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf"
        )
        name = PROTOCOLS.get(protocol, protocol)
    found = list(entry_points(group="opentelemetry_traces_exporter", name=name))
    try:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        exporter = found[0].load()()
    except (ImportError, IndexError, ValueError) as error:
        log.warning(
            "no spans, although the environment asks for them by the exporter %s: %s; "
            "pip install 'driftgate[otel]' brings otlp_proto_http and console",
            name,
            str(error) or type(error).__name__,
        )
        return None
    service = environment.get("OTEL_SERVICE_NAME", "driftgate")
    provider = TracerProvider(
        resource=Resource.create({"service.name": service}), shutdown_on_exit=False
    )
    provider.add_span_processor(BatchSpanProcessor(exporter))
    log.info("spans go to the exporter %s", name)
    return Spans(provider)


class Spans:
    """Makes the spans of calls."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("driftgate")

    def begin(
        self,
        call: Call,
        plan: Plan,
        came: CIMultiDictProxy[str],
        sent: CIMultiDict[str],
        engine: str,
        url: str,
        started_ns: int,
    ) -> None:
        """Give ``call`` its span: a child of the one in the headers that ``came``, and the parent
        of the engine's by the headers that are ``sent``. ``url``: the engine's that is asked
        first."""
        from opentelemetry import propagate, trace
        from opentelemetry.trace import SpanKind

        operation = OPERATIONS[plan.api]
        span = self._tracer.start_span(
            f"{operation} {plan.model}".rstrip(),
            context=propagate.extract(came),
            kind=SpanKind.CLIENT,
            attributes=_server(url)
            | {
                "gen_ai.operation.name": operation,
                "gen_ai.provider.name": engine,
                **_asked(plan),
                "gen_ai.conversation.id": call.place.trajectory,
                "driftgate.call_id": call.call_id,
                "driftgate.step": call.step,
                "driftgate.retry": call.retry,
                "driftgate.attribution": call.place.attribution,
            },
            start_time=started_ns,
        )
        propagate.inject(sent, context=trace.set_span_in_context(span))
        call.span = CallSpan(span, started_ns)

    def close(self) -> None:
        """Export what is left, for at most ``STOP_WAIT_S``. Blocks."""
        closing = threading.Thread(target=self._provider.shutdown, name="spans", daemon=True)
        closing.start()
        closing.join(STOP_WAIT_S)
        if closing.is_alive():
            log.warning("the last spans were not exported within %.0f s", STOP_WAIT_S)


def _server(url: str) -> dict[str, Any]:
    parts = urlsplit(url)
    port = {} if parts.port is None else {"server.port": parts.port}
    return {"server.address": parts.hostname or "", **port}


class CallSpan:
    """One call's span. It ends when the call is over and, if there is one, its answer is folded:
    whichever comes last, because token counts are known only then."""

    def __init__(self, span: Span, started_ns: int) -> None:
        self._span = span
        self._started_ns = started_ns
        self._ended_ns: int | None = None
        self._folding = False
        self._lock = threading.Lock()

    def wait_for(self, recording: Future[None]) -> None:
        """The answer is being folded; the span stays open for ``folded`` until that is done."""
        self._folding = True
        recording.add_done_callback(self._recorded)

    def folded(self, folded: Folded, n: int) -> None:
        """What the answer was, with ``n`` samples of each prompt. The writer's thread."""
        samples = folded.samples
        prompts = {s.choice // n: s.prompt_ids for s in samples if s.prompt_ids is not None}
        responses = [s.response_ids for s in samples if s.response_ids is not None]
        if prompts:
            tokens = sum(len(ids) for ids in prompts.values())
            self._span.set_attribute("gen_ai.usage.input_tokens", tokens)
        if samples and len(responses) == len(samples):
            tokens = sum(len(ids) for ids in responses)
            self._span.set_attribute("gen_ai.usage.output_tokens", tokens)
        reasons = [s.finish_reason or "error" for s in samples]
        self._span.set_attribute("gen_ai.response.finish_reasons", reasons)
        missing = sorted({what for s in samples for what in s.missing})
        self._span.set_attribute("driftgate.missing", missing)

    def end(self, outcome: str, *, first_byte_ns: int | None, streamed: bool, now_ns: int) -> None:
        """The call is over for the agent."""
        from opentelemetry.trace import Status, StatusCode

        self._span.set_attribute("driftgate.outcome", outcome)
        if streamed and first_byte_ns is not None:
            waited_s = (first_byte_ns - self._started_ns) / 1e9
            self._span.set_attribute("gen_ai.response.time_to_first_chunk", waited_s)
        if outcome != "answered":
            self._span.set_attribute("error.type", outcome)
            self._span.set_status(Status(StatusCode.ERROR))
        with self._lock:
            self._ended_ns = now_ns
            done = not self._folding
        if done:
            self._span.end(now_ns)

    def _recorded(self, recording: Future[None]) -> None:
        if not recording.cancelled() and (error := recording.exception()) is not None:
            self._span.set_attribute("driftgate.not_recorded", type(error).__name__)
        with self._lock:
            self._folding = False
            ended_ns = self._ended_ns
        if ended_ns is not None:
            self._span.end(ended_ns)


def _asked(plan: Plan) -> dict[str, Any]:
    asked: dict[str, Any] = {"gen_ai.request.stream": plan.stream}
    if plan.model:
        asked["gen_ai.request.model"] = plan.model
    if plan.n != 1:
        asked["gen_ai.request.choice.count"] = plan.n
    for name in SETTINGS:
        if (value := getattr(plan.sampling, name)) is not None:
            asked[f"gen_ai.request.{name}"] = value
    return asked
