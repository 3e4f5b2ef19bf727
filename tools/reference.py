"""The reference pages of the documentation, made from the code each time the site is built.

Nothing is described by hand a second time: settings from their Structs and the docstrings under
their fields, commands from ``--help``, the API from its OpenAPI document, metrics from the glossary
and from what ``/metrics`` renders. Pure: every page is a function that gives Markdown.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import msgspec
import typer.main
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner

from driftgate.bands import BANDS
from driftgate.cli import app
from driftgate.codes import CODES, SEVERITY
from driftgate.gates import GATES
from driftgate.gateway.api import ROUTES
from driftgate.gateway.config import GatewayConfig
from driftgate.gateway.drift_metrics import families
from driftgate.gateway.metrics import Metrics
from driftgate.gateway.openapi import document
from driftgate.glossary import METRICS, ROUTER_METRICS, Metric
from driftgate.profiles import PROFILES, Limit
from driftgate.replay import REPLAY_METRICS
from driftgate.storage import WriterStats
from driftgate.teacher.config import TeacherConfig

__all__ = ["PAGES", "field_docs"]

WIDTH = 100
"""Columns of ``--help``."""


def field_docs(kind: type) -> dict[str, str]:
    """The docstring under each field of a class, as one line."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(tree, ast.ClassDef)
    docs: dict[str, str] = {}
    for field, after in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(after, ast.Expr):
            value = after.value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                assert isinstance(field.target, ast.Name)
                docs[field.target.id] = " ".join(value.value.split())
    return docs


def configuration() -> str:
    """Settings of the gateway and the teacher."""
    return "\n".join(
        [
            "# Configuration",
            "",
            "The gateway's settings are the keys of the TOML file that `driftgate serve --config` "
            "takes; many are options of `driftgate serve` too, and an option wins. The teacher's "
            "are options of `driftgate teach`. All are checked once, at the start.",
            "",
            "## Gateway",
            "",
            *_settings(GatewayConfig),
            "## Teacher",
            "",
            *_settings(TeacherConfig),
        ]
    )


def _settings(kind: type[msgspec.Struct]) -> Iterator[str]:
    docs = field_docs(kind)
    yield from ("| setting | type | default | |", "|---|---|---|---|")
    types = kind.__annotations__  # as written: annotations are not evaluated there
    for field in msgspec.structs.fields(kind):
        default = _default(field)
        yield _row(
            f"`{field.name}`", f"`{types[field.name]}`", default, _prose(docs.get(field.name, ""))
        )
    yield ""


def _default(field: msgspec.structs.FieldInfo) -> str:
    if field.default is not msgspec.NODEFAULT:
        return f"`{field.default}`"
    if field.default_factory is not msgspec.NODEFAULT:
        return f"`{field.default_factory()}`"
    return "must be given"


def cli() -> str:
    """``--help`` of every command."""
    return "\n".join(["# Command line", "", *_help(typer.main.get_command(app), ())])


def _help(command: Any, words: tuple[str, ...]) -> Iterator[str]:
    shown = CliRunner().invoke(
        app,
        [*words, "--help"],
        prog_name="driftgate",
        terminal_width=WIDTH,
        max_content_width=WIDTH,
    )
    if words:
        yield from (f"## driftgate {' '.join(words)}", "")
    yield from ("```text", shown.output.rstrip(), "```", "")
    for name, sub in getattr(command, "commands", {}).items():
        yield from _help(sub, (*words, name))


def api() -> str:
    """The HTTP API, from its OpenAPI document."""
    described = document(ROUTES, version="")
    parts = [
        "# HTTP API",
        "",
        "The same as OpenAPI: `GET /api/openapi.json`. `driftgate.Client` is its typed client. "
        'Errors are `{"error": {"status", "message"}}`.',
        "",
    ]
    for path, operations in described["paths"].items():
        for method, operation in operations.items():
            parts += [f"## {method.upper()} {path}", "", operation["summary"], ""]
            parts += [_prose(operation.get("description", "")), ""]
            if operation["parameters"]:
                parts += ["| parameter | in | type |", "|---|---|---|"]
                parts += [
                    _row(f"`{p['name']}`", p["in"], _type(p["schema"]))
                    for p in operation["parameters"]
                ]
                parts.append("")
            body = operation.get("requestBody")
            if body:
                parts += [f"Body: {_type(body['content']['application/json']['schema'])}", ""]
            kinds = operation["responses"]["200"]["content"]
            answer = next(iter(kinds.values()))["schema"]
            parts += [f"Answer ({', '.join(kinds)}): {_type(answer)}", ""]
    parts += ["## Structures", ""]
    docs = {kind.__name__: field_docs(kind) for kind in _structs()}
    for name, schema in sorted(described["components"]["schemas"].items()):
        parts += [f"### {name}", "", _prose(schema.get("description", "")), ""]
        if "properties" in schema:
            parts += ["| field | type | |", "|---|---|---|"]
            said = docs.get(name, {})
            parts += [
                _row(f"`{field}`", _type(kind), _prose(said.get(field, "")))
                for field, kind in schema["properties"].items()
            ]
            parts.append("")
    return "\n".join(parts)


def _structs() -> Iterable[type[msgspec.Struct]]:
    """Every Struct class that is loaded, for its field docs."""
    todo: list[type[msgspec.Struct]] = [msgspec.Struct]
    while todo:
        kind = todo.pop()
        todo.extend(kind.__subclasses__())
        if kind.__module__.startswith("driftgate."):
            yield kind


def _type(schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        name = schema["$ref"].rsplit("/", 1)[1]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in schema:
        return " or ".join(map(_type, schema["anyOf"]))
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if schema.get("type") == "array" and isinstance(schema.get("items"), dict):
        return f"list of {_type(schema['items'])}"
    extra = schema.get("additionalProperties")
    if isinstance(extra, dict) and extra:
        return f"map to {_type(extra)}"
    kind = schema.get("type", "any")
    return " or ".join(kind) if isinstance(kind, list) else str(kind)


def metrics() -> str:
    """Every metric of drift and of routing, from the glossary."""
    parts = [
        "# Metrics",
        "",
        "`D = logp_train - logp_rollout` of a sampled token in nats, `L` its sum over a response, "
        "`rho = e^D`. Means are over the tokens that the model sampled. A value that is not valid "
        "is null with a reason.",
        "",
        "## Bands",
        "",
        "Green short of the first, red from the second on; of `ess_kish_response` the other way "
        "round. Defaults of the field: read them beside the measured noise floor.",
        "",
        "| metric | green | amber ends | red |",
        "|---|---|---|---|",
    ]
    parts += [
        _row(f"`{n}`", *(f"{v:g}" for v in (b.green, b.amber, b.red))) for n, b in BANDS.items()
    ]
    parts += ["", "## Log-probabilities", "", *_glossary(METRICS.values())]
    parts += ["## Routing", "", *_glossary(ROUTER_METRICS.values())]
    parts += ["## Under replay", "", "| metric | formula |", "|---|---|"]
    parts += [_row(f"`{name}`", f"`{text}`") for name, text in REPLAY_METRICS.items()]
    return "\n".join([*parts, ""])


def _glossary(rows: Iterable[Metric]) -> Iterator[str]:
    yield from ("| metric | formula | unit | how to read it | trap |", "|---|---|---|---|---|")
    for row in rows:
        yield _row(f"`{row.name}`", f"`{row.formula}`", row.unit, row.reads, row.trap)
    yield ""


def reasons() -> str:
    """Codes of comparability, the verdicts' limits, and the trainers' gates."""
    parts = [
        "# Reasons, verdicts and gates",
        "",
        "## Is the comparison valid?",
        "",
        "`no`: the numbers do not measure engine against trainer. `converted`: they do, under the "
        "transform or across the difference that the reason names. `note`: worth knowing.",
        "",
        "| code | weight | |",
        "|---|---|---|",
        *(_row(f"`{code}`", SEVERITY[code], meaning) for code, meaning in CODES.items()),
        "",
        "## Limits of the verdicts",
        "",
    ]
    for profile in PROFILES.values():
        parts += [f"### Profile {profile.name}", "", profile.about, ""]
        parts += ["| reason | when | verdict |", "|---|---|---|"]
        parts += [_row(f"`{li.code}`", _limit(li), f"`{li.verdict}`") for li in profile.limits]
        parts.append("")
    parts += ["## Gates that trainers ship", "", "| metric | of | rule | in force | source |"]
    parts.append("|---|---|---|---|---|")
    parts += [_row(f"`{g.metric}`", g.of, g.rule, g.on, _prose(g.source)) for g in GATES.values()]
    return "\n".join([*parts, ""])


def _limit(limit: Limit) -> str:
    if limit.above is not None:
        return f"`{limit.metric}` above {limit.above:g}"
    return f"`{limit.metric}` below {limit.below:g}"


def prometheus() -> str:
    """What ``/metrics`` shows."""
    metrics = Metrics(WriterStats)
    labels = {m._name: m._labelnames for m in vars(metrics).values() if hasattr(m, "_labelnames")}
    shown = list(text_string_to_metric_families(metrics.render().decode()))
    drift = families()
    labels |= {family.name: family._labelnames for family in drift}  # type: ignore[attr-defined]
    parts = [
        "# Prometheus metrics",
        "",
        "`GET /metrics` of a gateway. A dashboard is in `deploy/grafana/driftgate.json`, alert "
        "rules are in `deploy/prometheus/alerts.yml`.",
        "",
        "| name | type | labels | |",
        "|---|---|---|---|",
    ]
    for family in (*shown, *drift):
        if family.name.endswith("_created"):  # when a counter began, beside each of them
            continue
        name = f"{family.name}_total" if family.type == "counter" else family.name
        names = ", ".join(f"`{label}`" for label in labels.get(family.name, ()))
        parts.append(_row(f"`{name}`", family.type, names, family.documentation))
    return "\n".join([*parts, ""])


def _prose(text: str) -> str:
    """Docstring's double backticks as Markdown's."""
    return text.replace("``", "`")


def _row(*cells: str) -> str:
    return "| " + " | ".join(_cell(cell) for cell in cells) + " |"


def _cell(text: str) -> str:
    """Bars would end a cell, stars would be emphasis outside of code."""
    parts = re.split(r"(`[^`]*`)", text.replace("|", "\\|").replace("\n", " "))
    return "".join(p if p.startswith("`") else p.replace("*", "\\*") for p in parts)


PAGES: dict[str, Callable[[], str]] = {
    "reference/configuration.md": configuration,
    "reference/cli.md": cli,
    "reference/api.md": api,
    "reference/metrics.md": metrics,
    "reference/reasons.md": reasons,
    "reference/prometheus.md": prometheus,
}
"""Generated pages by their path in the site."""
