"""An OpenTelemetry collector that keeps the spans it gets, on a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

__all__ = ["Collector", "collecting"]


class Collector:
    """Spans by their trace. Thread-safe."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._came = threading.Condition()
        self._spans: list[Span] = []

    def add(self, body: bytes) -> None:
        """An export over OTLP, as protobuf."""
        export = ExportTraceServiceRequest.FromString(body)
        scopes = [scope for resource in export.resource_spans for scope in resource.scope_spans]
        with self._came:
            self._spans += [span for scope in scopes for span in scope.spans]
            self._came.notify_all()

    def of_trace(self, trace_id: str, *, spans: int, timeout_s: float) -> list[Span]:
        """The spans of a trace once there are so many; those there are when time is up."""

        def found() -> list[Span]:
            return [span for span in self._spans if span.trace_id.hex() == trace_id]

        with self._came:
            self._came.wait_for(lambda: len(found()) >= spans, timeout_s)
            return found()


@contextmanager
def collecting() -> Iterator[Collector]:
    """A collector that listens on loopback."""

    class Take(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            collector.add(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.send_header("content-type", "application/x-protobuf")
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Take)
    collector = Collector(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield collector
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
