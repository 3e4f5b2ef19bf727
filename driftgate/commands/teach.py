"""``driftgate teach``: the trainer scores what the gateway records."""

from __future__ import annotations

import logging
from typing import Annotated, Literal

import typer

from driftgate import cli_io, logs
from driftgate.commands.options import DEFAULT_STORE, LogFormatOption, StoreOption
from driftgate.errors import DriftgateError

__all__ = ["teach"]

log = logging.getLogger("driftgate.teach")


def teach(
    model: Annotated[str, typer.Option(help="Directory of the trainer's checkpoint.")],
    store: StoreOption = DEFAULT_STORE,
    backend: Annotated[
        Literal["reference", "fsdp", "megatron"],
        typer.Option(
            help="reference: one process of Hugging Face; fsdp: torch fully_shard; "
            "megatron: Megatron-Core."
        ),
    ] = "reference",
    nproc: Annotated[int, typer.Option(help="Processes of the fsdp or megatron backend.")] = 1,
    tp: Annotated[int, typer.Option(help="megatron: tensor parallel ranks.")] = 1,
    pp: Annotated[int, typer.Option(help="megatron: pipeline parallel ranks.")] = 1,
    ep: Annotated[int, typer.Option(help="megatron: expert parallel ranks.")] = 1,
    sequence_parallel: Annotated[
        bool, typer.Option("--sequence-parallel", help="megatron: share positions over --tp.")
    ] = False,
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
    batching: Annotated[
        Literal["alone", "padded", "packed"],
        typer.Option(
            help="Several sequences in one forward: faster for short ones, other last bits."
        ),
    ] = "alone",
    replay: Annotated[
        bool,
        typer.Option(
            "--replay/--no-replay",
            help="Score a mixture of experts under the rollout's routes too: twice the forwards.",
        ),
    ] = True,
    lease_s: Annotated[
        float, typer.Option(help="Seconds after which a dead worker's trajectory is free again.")
    ] = 120.0,
    device: Annotated[
        Literal["auto", "cpu", "cuda"], typer.Option(help="auto: CUDA where there is one.")
    ] = "auto",
    log_format: LogFormatOption = None,
) -> None:
    """Score the store's traces with the trainer.

    Beside a running gateway with --follow, which also waits for one that has not made the store
    yet, or afterwards: then it ends when every trace is scored or refused, and waits for what
    other workers hold. Several may share a store.
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
            tensor_parallel=tp,
            pipeline_parallel=pp,
            expert_parallel=ep,
            sequence_parallel=sequence_parallel,
            follow=follow,
            served_model=served_model,
            weight_version=weight_version,
            dtype=dtype,
            train_dtype=train_dtype,
            max_tokens=max_tokens,
            batching=batching,
            device=device,
            replay=replay,
            lease_s=lease_s,
            log_format=log_format or "text",
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    logs.configure(settings.log_format)
    if not follow:
        cli_io.existing(store)
    elif not store.exists():
        log.warning("there is no store at %s yet: it is made, and waits for a gateway", store)
    raise typer.Exit(launch(settings))
