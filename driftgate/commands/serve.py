"""``driftgate serve`` and ``driftgate probe``: what stands between an agent and its engine."""

from __future__ import annotations

import asyncio
import logging
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
import typer

from driftgate import cli_io, logs
from driftgate.commands.options import LogFormatOption
from driftgate.errors import DriftgateError

if TYPE_CHECKING:
    from driftgate.gateway.config import GatewayConfig

__all__ = ["probe", "serve"]


def serve(
    upstream: Annotated[
        list[str] | None,
        typer.Option(help="Base URL of an engine, without /v1; again for each further one."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="TOML file with any of the gateway's settings.")
    ] = None,
    store: Annotated[Path | None, typer.Option(help="Directory of the store.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 0 takes a free one.")] = None,
    durability: Annotated[
        Literal["group", "strict"] | None,
        typer.Option(help="strict: an answer ends only when its trace is on disk."),
    ] = None,
    on_capture_failure: Annotated[
        Literal["serve", "refuse"] | None,
        typer.Option(help="What a call meets that cannot be recorded."),
    ] = None,
    streaming_routes: Annotated[
        Literal["auto", "plugin", "synthesise", "off"] | None,
        typer.Option(help="How routed experts of streamed answers are got."),
    ] = None,
    continuation: Annotated[
        Literal["rendered", "exact"] | None,
        typer.Option(help="exact: prompts keep the ids that were sampled for earlier answers."),
    ] = None,
    logprobs_mode: Annotated[
        str | None, typer.Option(help="The engine's logprobs mode, e.g. raw_logprobs.")
    ] = None,
    weight_version: Annotated[
        str | None, typer.Option(help="Version of the policy that the engine serves.")
    ] = None,
    log_format: LogFormatOption = None,
    upstream_key: Annotated[
        str | None,
        typer.Option(
            help="Sent to the engine in place of the agent's key; better in the environment.",
            envvar="DRIFTGATE_UPSTREAM_KEY",
            show_default=False,
        ),
    ] = None,
    tls_cert: Annotated[
        Path | None, typer.Option(help="PEM file with the certificate, to listen with TLS.")
    ] = None,
    tls_key: Annotated[
        Path | None,
        typer.Option(help="PEM file with its private key; else it is in the same."),
    ] = None,
) -> None:
    """Run the gateway in front of an engine.

    Then point an agent's OPENAI_BASE_URL at http://HOST:PORT/v1. Options win over --config.

    Any other --host than loopback needs keys, from `driftgate key`: their digests in --config, or
    the keys themselves in DRIFTGATE_CALL_KEY, DRIFTGATE_READ_KEY and DRIFTGATE_ADMIN_KEY, several
    with commas between. DRIFTGATE_SIGNING_KEY signs the keys of trajectories.
    """
    given: dict[str, Any] = {
        **({"upstream": "", "upstreams": upstream} if upstream else {}),
        "store": store,
        "host": host,
        "port": port,
        "durability": durability,
        "on_capture_failure": on_capture_failure,
        "streaming_routes": streaming_routes,
        "continuation": continuation,
        "logprobs_mode": logprobs_mode,
        "weight_version": weight_version,
        "log_format": log_format,
        "upstream_key": upstream_key,
        "tls_cert": tls_cert,
        "tls_key": tls_key,
    }
    given |= keys_from(os.environ)
    settings = _gateway_config(config, {k: v for k, v in given.items() if v is not None})
    from driftgate.gateway.app import run

    logs.configure(settings.log_format)
    _warn(settings)
    try:
        run(settings, started=lambda url: print(_welcome(url, settings), flush=True))
    except OSError as error:
        raise DriftgateError(
            f"cannot serve at {settings.host}:{settings.port}: {error}; "
            "choose another --host or --port"
        ) from error


def probe(
    url: Annotated[str, typer.Argument(help="Base URL of the engine, without /v1.")],
    model: Annotated[str | None, typer.Option(help="Served model to ask; else the first.")] = None,
    key: Annotated[str | None, typer.Option(help="The engine's API key.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Say which parts of a trace an engine gives.

    And in plain words, for each part that is missing, how to switch it on. Status 1 where ids or
    log-probabilities are missing, which every score needs.
    """
    from driftgate.gateway.probe import probe as probe_engine

    report = asyncio.run(probe_engine(url, key=key, model=model))
    print(cli_io.indented(report) if as_json else cli_io.report_text(report))
    raise typer.Exit(0 if report.captures else 1)


def keys_from(environment: Mapping[str, str]) -> dict[str, list[str] | str]:
    """The keys' settings that the environment gives; BadParameter for one that is too weak."""
    from driftgate.gateway.keys import digest_of

    found: dict[str, list[str] | str] = {}
    for name in ("CALL", "READ", "ADMIN"):
        variable = f"DRIFTGATE_{name}_KEY"
        if keys := environment.get(variable):
            try:
                found[f"{name.lower()}_keys"] = [digest_of(k.strip()) for k in keys.split(",")]
            except ValueError as error:
                raise typer.BadParameter(str(error), param_hint=variable) from error
    if signing := environment.get("DRIFTGATE_SIGNING_KEY"):
        found["signing_key"] = signing
    return found


def _warn(settings: GatewayConfig) -> None:
    """What is allowed and still not wise."""
    from driftgate.gateway.keys import is_loopback

    if not is_loopback(settings.host) and settings.tls_cert is None:
        log = logging.getLogger("driftgate")
        log.warning("keys and prompts pass in the clear: set tls_cert, or put TLS in front")


def _welcome(url: str, settings: GatewayConfig) -> str:
    return (
        f"driftgate at {url}, in front of {', '.join(settings.urls)}, store {settings.store}\n"
        f"  agents:  OPENAI_BASE_URL={url}/v1\n"
        f"  teacher: driftgate teach --follow --store {settings.store} --model DIR\n"
        f"  drift:   driftgate tail --url {url}\n"
        f"  look:    {url}/"
    )


def _gateway_config(file: Path | None, given: dict[str, Any]) -> GatewayConfig:
    """The settings of the file with the options over them; wrong ones are usage errors."""
    from driftgate.gateway.config import GatewayConfig

    values: dict[str, Any] = {}
    if file is not None:
        try:
            values = tomllib.loads(file.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise typer.BadParameter(f"{file}: {error}", param_hint="--config") from error
    values |= {name: str(v) if isinstance(v, Path) else v for name, v in given.items()}
    if unknown := sorted(values.keys() - set(GatewayConfig.__struct_fields__)):
        raise typer.BadParameter(
            f"{file}: there is no setting {', '.join(unknown)}", param_hint="--config"
        )
    if not values.get("upstream") and not values.get("upstreams"):
        raise typer.BadParameter(
            "give the engine's base URL, e.g. --upstream http://host:8000", param_hint="--upstream"
        )
    try:
        return msgspec.convert(values, GatewayConfig, dec_hook=_decode_path)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def _decode_path(kind: type, value: object) -> object:
    if kind is Path and isinstance(value, str):
        return Path(value)
    raise NotImplementedError(f"no setting is a {kind.__name__}")
