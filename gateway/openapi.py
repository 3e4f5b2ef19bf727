"""``/api/openapi.json``, derived from the route table and the structs of requests and answers.

Nothing is described by hand a second time: parameters come from a route's query struct, bodies from
msgspec's JSON schema of ``driftgate.views``. A route that is mounted is in the document.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from driftgate.client import CURSOR_HEADER
from driftgate.gateway.keys import access_of
from driftgate.gateway.wire import MAX_STEP
from driftgate.views import ApiError

__all__ = ["Route", "document"]

REF = "#/components/schemas/{name}"

STREAM_TYPES = ("application/x-ndjson", "text/event-stream")

RESUME = {
    "name": "Last-Event-ID",
    "in": "header",
    "required": False,
    "schema": {"type": "string", "pattern": "^([0-9]{1,18}|now)?$"},
    "description": "Wins over `after`; browsers' EventSource sends it when it reconnects.",
}
CURSOR = {
    "required": True,
    "schema": {"type": "integer", "minimum": 0},
    "description": "The cursor that the stream starts behind.",
}


SCHEMES = {
    name: {"type": "http", "scheme": "bearer", "description": text}
    for name, text in {
        "read": "A key for reading. No key is asked for where the gateway has none.",
        "admin": "A key for administration; it opens what the others open.",
        "trajectory": "A trajectory's own key, which `POST /api/trajectories` gives: it opens what "
        "belongs to that trajectory. Of `/api/drift` that is `?trajectory=` with its name.",
    }.items()
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """One endpoint."""

    method: str
    path: str
    """aiohttp's and OpenAPI's spelling agree: ``/api/trajectories/{trajectory}``."""
    handler: Callable[..., Awaitable[Any]]
    """Its docstring's first line is the summary, the rest the description."""
    answer: Any
    """Struct of a 200; of one line or event where ``stream`` is set."""
    query: type[msgspec.Struct] | None = None
    body: type[msgspec.Struct] | None = None
    stream: bool = False


def document(routes: Sequence[Route], *, version: str) -> dict[str, Any]:
    """OpenAPI 3.1 of ``routes``."""
    kinds: list[Any] = [ApiError]
    for route in routes:
        kinds.extend(kind for kind in (route.answer, route.body) if kind not in (None, dict))
    schemas, components = msgspec.json.schema_components(kinds, ref_template=REF)
    of = dict(zip(kinds, schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, of)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "driftgate",
            "version": version,
            "description": "Would the trainer see the policy that produced this rollout?",
        },
        "paths": paths,
        "components": {"schemas": components, "securitySchemes": SCHEMES},
    }


def _operation(route: Route, of: dict[Any, Any]) -> dict[str, Any]:
    summary, _, description = (route.handler.__doc__ or "").strip().partition("\n")
    schema = of.get(route.answer, {"type": "object"})
    types = STREAM_TYPES if route.stream else ("application/json",)
    operation: dict[str, Any] = {
        "operationId": route.handler.__name__.strip("_"),
        "summary": summary,
        "security": _security(route),
        "parameters": [*_path_parameters(route.path), *_query_parameters(route.query)],
        "responses": {
            "200": {
                "description": "A stream, one of these a line or event" if route.stream else "OK",
                "content": {kind: {"schema": schema} for kind in types},
            },
            "default": {
                "description": "What is wrong and what to do about it",
                "content": {"application/json": {"schema": of[ApiError]}},
            },
        },
    }
    if description.strip():
        operation["description"] = " ".join(description.split())
    if route.body is not None:
        content = {"application/json": {"schema": of[route.body]}}
        required = any(field.required for field in msgspec.structs.fields(route.body))
        operation["requestBody"] = {"required": required, "content": content}
    if route.stream:
        operation["parameters"].append(RESUME)
        operation["responses"]["200"]["headers"] = {CURSOR_HEADER: CURSOR}
    return operation


def _security(route: Route) -> list[dict[str, list[str]]]:
    """Any one of these keys."""
    if access_of(route.method, route.path) == "admin":
        return [{"admin": []}]
    own = "{trajectory}" in route.path or (route.query is not None and route.stream)
    return [{name: []} for name in ("read", "admin", *(["trajectory"] if own else []))]


_STEP = {"type": "integer", "minimum": 0, "maximum": MAX_STEP}


def _path_parameters(path: str) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "in": "path",
            "required": True,
            "schema": _STEP if name == "step" else {"type": "string"},
            "description": "Percent-encoded; an encoded slash belongs to the name.",
        }
        for name in re.findall(r"\{(\w+)\}", path)
    ]


def _query_parameters(query: type[msgspec.Struct] | None) -> list[dict[str, Any]]:
    if query is None:
        return []
    (_,), components = msgspec.json.schema_components([query], ref_template=REF)
    told = components[query.__name__]
    required = told.get("required", ())
    return [
        {"name": name, "in": "query", "required": name in required, "schema": schema}
        for name, schema in told["properties"].items()
    ]
