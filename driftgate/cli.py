"""The ``driftgate`` command: a thin edge that turns arguments into calls and errors into one line.

What a command needs is imported inside it, so that ``driftgate --help`` is quick and torch is
loaded only by ``teach``.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import msgspec
import typer

from driftgate import cli_io
from driftgate.client import DEFAULT_URL, Client
from driftgate.errors import DriftgateError

if TYPE_CHECKING:
    from driftgate.gateway.config import GatewayConfig

__all__ = ["app", "main"]

DEFAULT_STORE = Path("driftgate-store")
"""The gateway's default as well."""

CHUNK_BYTES = 1 << 20
"""The export is written in pieces of about this size."""

app = typer.Typer(
    name="driftgate",
    help="Records what a rollout engine sampled, scores it with the trainer, and says where they "
    "differ.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
index_app = typer.Typer(help="The store's index.", no_args_is_help=True)
app.add_typer(index_app, name="index")

StoreOption = Annotated[
    Path, typer.Option("--store", help="Directory of the store.", envvar="DRIFTGATE_STORE")
]
StoreInstead = Annotated[
    Path | None,
    typer.Option("--store", help="Read this store directly instead of asking a gateway."),
]
UrlOption = Annotated[
    str, typer.Option("--url", help="Address of the gateway.", envvar="DRIFTGATE_URL")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the API's JSON.")]
KeyOption = Annotated[
    str | None,
    typer.Option("--key", help="Key for reading, if asked for.", envvar="DRIFTGATE_KEY"),
]


def main() -> NoReturn:
    """Entry point. Errors made on purpose are one line on stderr and status 1; wrong usage is 2."""
    try:
        app()
    except DriftgateError as error:
        sys.exit(f"driftgate: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)


@app.command()
def serve(
    upstream: Annotated[
        str | None, typer.Option(help="Base URL of the engine, without /v1.")
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
    logprobs_mode: Annotated[
        str | None, typer.Option(help="The engine's logprobs mode, e.g. raw_logprobs.")
    ] = None,
    weight_version: Annotated[
        str | None, typer.Option(help="Version of the policy that the engine serves.")
    ] = None,
    upstream_key: Annotated[
        str | None,
        typer.Option(
            help="Sent to the engine in place of the agent's key; better in the environment.",
            envvar="DRIFTGATE_UPSTREAM_KEY",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Run the gateway in front of an engine.

    Then point an agent's OPENAI_BASE_URL at http://HOST:PORT/v1. Options win over --config.
    """
    given = {
        "upstream": upstream,
        "store": store,
        "host": host,
        "port": port,
        "durability": durability,
        "on_capture_failure": on_capture_failure,
        "streaming_routes": streaming_routes,
        "logprobs_mode": logprobs_mode,
        "weight_version": weight_version,
        "upstream_key": upstream_key,
    }
    settings = _gateway_config(config, {k: v for k, v in given.items() if v is not None})
    from driftgate.gateway.app import run

    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    try:
        run(settings, started=lambda url: print(_welcome(url, settings), flush=True))
    except OSError as error:
        raise DriftgateError(
            f"cannot serve at {settings.host}:{settings.port}: {error}; "
            "choose another --host or --port"
        ) from error


@app.command()
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


@app.command()
def teach(
    model: Annotated[str, typer.Option(help="Directory of the trainer's checkpoint.")],
    store: StoreOption = DEFAULT_STORE,
    backend: Annotated[
        Literal["reference", "fsdp"],
        typer.Option(help="reference: one process of Hugging Face; fsdp: torch fully_shard."),
    ] = "reference",
    nproc: Annotated[int, typer.Option(help="Processes of the fsdp backend.")] = 1,
    follow: Annotated[bool, typer.Option("--follow", help="Keep scoring what arrives.")] = False,
    served_model: Annotated[
        str | None, typer.Option(help="Score only traces of this served model name.")
    ] = None,
    weight_version: Annotated[
        str | None, typer.Option(help="Policy version of this checkpoint, as the gateway names it.")
    ] = None,
    dtype: Annotated[
        Literal["auto", "bfloat16", "float16", "float32"],
        typer.Option(help="Precision of the weights; auto is the checkpoint's own."),
    ] = "auto",
    train_dtype: Annotated[
        str | None, typer.Option(help="Precision of the training job; other scores are marked.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Longest sequence that fits this machine.")
    ] = None,
    device: Annotated[
        Literal["auto", "cpu", "cuda"], typer.Option(help="auto: CUDA where there is one.")
    ] = "auto",
) -> None:
    """Score the store's traces with the trainer.

    Beside a running gateway with --follow, or afterwards. Several may share a store.
    """
    try:
        from driftgate.teacher.config import TeacherConfig
        from driftgate.teacher.launch import launch
    except ModuleNotFoundError as error:
        raise DriftgateError(
            f"`driftgate teach` needs {error.name}: pip install 'driftgate[teacher]'"
        ) from error
    try:
        settings = TeacherConfig(
            store=str(store),
            model=model,
            backend=backend,
            nproc=nproc,
            follow=follow,
            served_model=served_model,
            weight_version=weight_version,
            dtype=dtype,
            train_dtype=train_dtype,
            max_tokens=max_tokens,
            device=device,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    raise typer.Exit(launch(settings))


@app.command()
def tail(
    url: UrlOption = DEFAULT_URL,
    trajectory: Annotated[str | None, typer.Option(help="Only this trajectory.")] = None,
    after: Annotated[
        str, typer.Option(help="Cursor to go on behind: 0 for all there is, `now` for what comes.")
    ] = "now",
    follow: Annotated[bool, typer.Option(help="Stay for what comes.")] = True,
    as_json: JsonOption = False,
    key: KeyOption = None,
) -> None:
    """Print a line for each scored step as it arrives.

    Green, amber and red are METRICS' bands; grey is what is not comparable.
    """
    if after != "now" and not (after.isascii() and after.isdigit()):
        raise typer.BadParameter(f"{after!r} is neither a cursor nor `now`", param_hint="--after")
    start: int | Literal["now"] = "now" if after == "now" else int(after)

    async def run(client: Client) -> None:
        from driftgate.render import drift_line

        console = cli_io.console()
        events = client.drift(after=start, follow=follow, trajectory=trajectory)
        async with contextlib.aclosing(events):
            async for event in events:
                if as_json:
                    print(msgspec.json.encode(event).decode(), flush=True)
                else:
                    console.print(drift_line(event), soft_wrap=True)

    cli_io.ask(url, key, run)


@app.command()
def show(
    trajectory: Annotated[str, typer.Argument(help="Name of the trajectory.")],
    step: Annotated[int | None, typer.Option(help="This step in full, token by token.")] = None,
    as_json: JsonOption = False,
    store: StoreInstead = None,
    url: UrlOption = DEFAULT_URL,
    key: KeyOption = None,
) -> None:
    """Show a trajectory, or one step of it in full.

    Its steps, what is missing, and where trainer and engine differ.
    """
    if step is not None:
        in_full = cli_io.read_or_ask(
            store, url, key, lambda a: a.step(trajectory, step), lambda c: c.step(trajectory, step)
        )
        cli_io.show(in_full, as_json, lambda render: render.step(in_full))
        return
    detail = cli_io.read_or_ask(
        store, url, key, lambda a: a.trajectory(trajectory), lambda c: c.trajectory(trajectory)
    )
    cli_io.show(detail, as_json, lambda render: render.trajectory(detail))
    if not as_json:
        found = cli_io.read_or_ask(
            store, url, key, lambda a: a.mismatch(trajectory), lambda c: c.mismatch(trajectory)
        )
        cli_io.show(found, False, lambda render: render.mismatch(found))


@app.command()
def cells(
    as_json: JsonOption = False,
    store: StoreInstead = None,
    url: UrlOption = DEFAULT_URL,
    key: KeyOption = None,
) -> None:
    """Print the matrix of engines against trainers.

    Each number has its 95 % interval and, beside it, the noise floor.
    """
    found = cli_io.read_or_ask(
        store, url, key, lambda answers: answers.cells(), lambda client: client.cells()
    )
    cli_io.show(found, as_json, lambda render: render.matrix(found.items))


@app.command()
def export(
    jsonl: Annotated[
        bool, typer.Option("--jsonl", help="JSON lines: the only format so far.")
    ] = True,
    store: StoreOption = DEFAULT_STORE,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write; else stdout.")
    ] = None,
    trajectory: Annotated[str | None, typer.Option(help="Only this trajectory.")] = None,
) -> None:
    """Write every trace as state, action and reward.

    One JSON object a line, complete: nothing is truncated.
    """
    from driftgate.adapters.jsonl import rows
    from driftgate.storage import Reader

    lines = msgspec.json.Encoder()
    with contextlib.closing(Reader(cli_io.existing(store))) as reader, cli_io.sink(output) as sink:
        pending = bytearray()
        for row in rows(reader, trajectory):
            pending += lines.encode(row) + b"\n"
            if len(pending) > CHUNK_BYTES:
                sink.write(pending)
                pending.clear()
        sink.write(pending)


@index_app.command("rebuild")
def rebuild(store: StoreOption = DEFAULT_STORE) -> None:
    """Make the index anew from the segments.

    No gateway or teacher may be writing to the store.
    """
    from driftgate.storage import rebuild_index

    report = rebuild_index(cli_io.existing(store))
    print(", ".join(f"{name} {value}" for name, value in msgspec.structs.asdict(report).items()))


@app.command()
def version() -> None:
    """Print the version."""
    from importlib.metadata import version as version_of

    print(version_of("driftgate"))


def _welcome(url: str, settings: GatewayConfig) -> str:
    return (
        f"driftgate at {url}, in front of {settings.upstream}, store {settings.store}\n"
        f"  agents:  OPENAI_BASE_URL={url}/v1\n"
        f"  teacher: driftgate teach --follow --store {settings.store} --model DIR\n"
        f"  drift:   driftgate tail --url {url}"
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
    if "upstream" not in values:
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


if __name__ == "__main__":
    main()
