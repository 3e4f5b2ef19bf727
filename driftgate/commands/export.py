"""``driftgate export``: the store's traces for whoever learns from them."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec
import typer

from driftgate import cli_io
from driftgate.commands.options import DAMAGED_STATUS, DEFAULT_STORE, StoreOption
from driftgate.errors import DriftgateError
from driftgate.words import counted

if TYPE_CHECKING:
    from driftgate.adapters.export_base import Manifest
    from driftgate.storage import Reader

__all__ = ["FormatOption", "export"]

CHUNK_BYTES = 1 << 20
"""JSON lines are written in pieces of about this size."""

FormatOption = Literal[
    "jsonl",
    "hf",
    "megatron",
    "miles",
    "nemo-rl",
    "parquet",
    "prime-rl",
    "skyrl",
    "slime",
    "trl",
    "verl",
]


def export(
    format: Annotated[
        FormatOption, typer.Option("--format", "-f", help="Whose files to write.")
    ] = "jsonl",
    store: StoreOption = DEFAULT_STORE,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="jsonl: file to write, else stdout. Others: folder."),
    ] = None,
    trajectory: Annotated[str | None, typer.Option(help="Only this trajectory.")] = None,
    include_incomplete: Annotated[
        bool,
        typer.Option(
            "--include-incomplete", help="Keep traces that are left out for a reason, with a flag."
        ),
    ] = False,
    per_trace: Annotated[
        bool, typer.Option("--per-trace", help="Do not join the calls of a run into one sample.")
    ] = False,
) -> None:
    """Write what was recorded, for training or for reading.

    jsonl: every trace with its status, nothing truncated. Other formats: samples for that trainer
    in a new folder, without the traces that nobody should train on; how many and why is said on
    stderr. A trace that cannot be read is named, and the exit status is then 1.
    """
    from driftgate.storage import Reader

    with contextlib.closing(Reader(cli_io.existing(store))) as reader:
        if format == "jsonl":
            damaged = _write_lines(reader, output, trajectory)
        elif output is None:
            raise typer.BadParameter(f"{format} writes a folder: name it", param_hint="--output")
        else:
            manifest = _write_shards(
                reader, format, output, trajectory, include_incomplete, per_trace
            )
            damaged = manifest.damaged
            _report(manifest, output)
    for line in damaged:
        typer.echo(f"damaged: {line}", err=True)
    if damaged:
        raise typer.Exit(DAMAGED_STATUS)


def _write_lines(reader: Reader, output: Path | None, trajectory: str | None) -> list[str]:
    """JSON lines; returns what could not be read."""
    from driftgate.adapters.jsonl import rows

    lines, damaged = msgspec.json.Encoder(), list[str]()
    with cli_io.sink(output) as sink:
        pending = bytearray()
        for row in rows(reader, trajectory, damaged=damaged):
            pending += lines.encode(row) + b"\n"
            if len(pending) > CHUNK_BYTES:
                sink.write(pending)
                pending.clear()
        sink.write(pending)
    return damaged


def _write_shards(
    reader: Reader,
    format: str,
    output: Path,
    trajectory: str | None,
    include_incomplete: bool,
    per_trace: bool,
) -> Manifest:
    from driftgate.adapters import formats
    from driftgate.adapters.export_base import write_export
    from driftgate.adapters.export_select import Selection

    selection = Selection(reader, include_incomplete=include_incomplete, per_trace=per_trace)
    try:
        return write_export(
            selection.samples(trajectory),
            output,
            formats.load(format),
            left_out=selection.left_out,
            damaged=selection.damaged,
        )
    except ModuleNotFoundError as error:
        raise DriftgateError(
            f"--format {format} needs {error.name}: pip install 'driftgate[export,teacher]'"
        ) from error


def _report(manifest: Manifest, output: Path) -> None:
    """What is there and what is not, on stderr."""
    from driftgate.adapters.export_select import REASONS

    typer.echo(
        f"{counted(manifest.samples, 'sample')}, "
        f"{counted(manifest.sampled_tokens, 'sampled token')}, "
        f"{counted(len(manifest.shards), 'shard')} in {output}",
        err=True,
    )
    if manifest.flagged:
        typer.echo(f"{manifest.flagged} samples are flagged: see flags in .meta.jsonl", err=True)
    if off_policy := manifest.verdicts.get("replay"):
        typer.echo(
            f"{off_policy} samples have the verdict replay, off-policy data only: see verdict in "
            ".meta.jsonl",
            err=True,
        )
    if manifest.other_temperature:
        typer.echo(
            f"{manifest.other_temperature} samples were sampled at another temperature than their "
            "logprobs are at, or it is not known: a trainer that scales its logits must not "
            "compare with these; see logprobs_mode in .meta.jsonl, and vLLM's --logprobs-mode "
            "processed_logprobs",
            err=True,
        )
    for code, count in manifest.left_out.items():
        typer.echo(f"left out: {counted(count, 'trace')}, {code}: {REASONS[code]}", err=True)
