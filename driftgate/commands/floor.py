"""``driftgate floor``: each side against itself, so that drift can be read against it."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import closing
from functools import reduce
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from driftgate import cli_io
from driftgate.commands.options import DEFAULT_STORE, StoreOption
from driftgate.errors import DriftgateError
from driftgate.floor import label_of
from driftgate.mismatch import Bucket
from driftgate.router import RouterBucket
from driftgate.terminal import number, percent, safe
from driftgate.trace import Engine, Score, Trace

__all__ = ["floor"]


def floor(
    engine: Annotated[
        str | None, typer.Option(help="Base URL of the engine, without /v1: run it twice.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="The trainer's checkpoint directory: run it twice.")
    ] = None,
    store: StoreOption = DEFAULT_STORE,
    traces: Annotated[int, typer.Option(min=1, help="Answers to run again, the newest.")] = 32,
    served_model: Annotated[
        str | None, typer.Option(help="Only answers of this served model name.")
    ] = None,
    concurrency: Annotated[
        int, typer.Option(min=1, help="Requests at the engine at once; more let it batch.")
    ] = 4,
    key: Annotated[
        str | None, typer.Option(help="The engine's API key.", envvar="DRIFTGATE_ENGINE_KEY")
    ] = None,
    backend: Annotated[
        Literal["reference", "fsdp", "megatron"], typer.Option(help="The trainer's backend.")
    ] = "reference",
    nproc: Annotated[int, typer.Option(help="Processes of the fsdp or megatron backend.")] = 1,
    tp: Annotated[int, typer.Option(help="megatron: tensor parallel ranks.")] = 1,
    pp: Annotated[int, typer.Option(help="megatron: pipeline parallel ranks.")] = 1,
    ep: Annotated[int, typer.Option(help="megatron: expert parallel ranks.")] = 1,
    sequence_parallel: Annotated[
        bool, typer.Option("--sequence-parallel", help="megatron: share positions over --tp.")
    ] = False,
    dtype: Annotated[
        Literal["auto", "bfloat16", "float16", "float32"],
        typer.Option(help="Precision of the trainer's weights."),
    ] = "auto",
) -> None:
    """Measure the noise floors: the same side twice on the same tokens.

    Of the engine, the same request again and, decoded tokens read back as a prompt; of the
    trainer, the same forward again. They are stored as cells of their own, and `driftgate cells`
    shows them beside every number.
    """
    if engine is None and model is None:
        raise typer.BadParameter("give --engine URL, --model DIR, or both")
    cli_io.existing(store)
    try:
        chosen = _chosen(store, served_model, traces)
        if engine is not None:
            _engine(engine, store, chosen, concurrency, key)
        if model is not None:
            settings: dict[str, Any] = {
                "model": model,
                "floor_traces": traces,
                "served_model": served_model,
                "backend": backend,
                "nproc": nproc,
                "tensor_parallel": tp,
                "pipeline_parallel": pp,
                "expert_parallel": ep,
                "sequence_parallel": sequence_parallel,
                "dtype": dtype,
            }
            raise typer.Exit(_trainer(store, settings))
    except ModuleNotFoundError as error:
        raise DriftgateError(
            f"`driftgate floor --model` needs {error.name}: pip install 'driftgate[teacher]'"
        ) from error


def _chosen(store: Path, model: str | None, limit: int) -> list[Trace]:
    """The answers to run again, at least one."""
    from driftgate.storage import Reader
    from driftgate.teacher.floors import choose

    with closing(Reader(store)) as reader:
        chosen = choose(reader, model=model, limit=limit)
    if not chosen:
        raise DriftgateError(f"{store} holds no answer that could be run again: capture some first")
    return chosen


def _engine(url: str, store: Path, chosen: list[Trace], concurrency: int, key: str | None) -> None:
    from driftgate.storage import Reader, Writer
    from driftgate.teacher.engine_floor import EngineFloors

    with closing(Reader(store)) as reader:
        known = {
            (row.meta.trace_id, row.meta.trainer.digest)
            for row in reader.scores(kind="noise_floor", limit=10_000)
        }
    floors = EngineFloors(url, key=key, concurrency=concurrency)
    scores = floors.measure(chosen, known)
    with closing(Writer(store, name="floor")) as writer:
        for pending in [writer.submit(score) for score in scores]:
            pending.result()
    print("\n".join(_lines(scores)) or "nothing was measured")
    for reason, count in floors.skipped.most_common():
        print(f"  {count} left out: {safe(reason)}")


def _lines(scores: Iterable[Score]) -> Iterable[str]:
    """One line for each kind of floor, from the merged sums."""
    kinds: dict[str, list[Score]] = {}
    for score in scores:
        assert isinstance(score.meta.engine, Engine)
        kinds.setdefault(label_of(score.meta.trainer), []).append(score)
    for label, group in sorted(kinds.items()):
        bucket = reduce(Bucket.merge, [s.meta.bucket for s in group if s.meta.bucket])
        values = bucket.metrics()
        routers = [s.meta.router for s in group if s.meta.router]
        line = (
            f"engine {label}: {bucket.n_tokens} tokens of {bucket.n_seqs} answers, "
            f"k3 {number(values['kl_k3_rollout_train'])}, "
            f"mean|D| {number(values['abs_log_ratio_mean'])}, "
            f"max|D| {number(values['abs_log_ratio_max'])}"
        )
        if routers:
            rate = reduce(RouterBucket.merge, routers).metrics()["router_set_disagree_rate"]
            line += f", router set-disagree {percent(rate)}"
        yield line


def _trainer(store: Path, settings: dict[str, Any]) -> int:
    """Run the trainer that ``settings`` of a ``TeacherConfig`` name twice; the exit status."""
    from driftgate.teacher.config import TeacherConfig
    from driftgate.teacher.launch import launch

    try:
        config = TeacherConfig(store=str(store), **settings)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    return launch(config)
