"""What scoring costs with length, vocabulary, company and workers.

Several sequences in one forward against one each, checked to be equal; peak memory of a process by
vocabulary and length; one worker on a queue against two.
"""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, get_args

import msgspec
import numpy as np
import torch
import transformers

from benchmarks.report import Goal, Section, Table
from benchmarks.teacher import THREADS, TOLERANCE, Model, alternate, make_models
from benchmarks.trajectories import Growth, trajectory
from driftgate.storage import Reader, Writer
from driftgate.teacher.batches import Batching, groups
from driftgate.teacher.config import BATCH_TOKENS, TeacherConfig
from driftgate.teacher.reference import ReferenceBackend
from driftgate.teacher.sequences import Sequence as Tokens
from driftgate.teacher.sequences import Slice, assemble

__all__ = ["run"]

SHORT = Growth(turns=1, before=32, response=32)
SHORT_TEXTS = 64

VOCABULARIES = (32_768, 151_936)
LENGTHS = (2048, 8192)
HIDDEN = 256
MEMORY_GOAL = 1.25
"""Largest over smallest of what a forward adds to a loaded process by vocabulary alone. Whole
logits in float32 would add 1.0 GB for the one and 4.9 GB for the other at 8k tokens."""

QUEUE = 48
QUEUE_TEXT = Growth(turns=1, before=512, response=512)
QUEUE_MODEL = "dense, 8 x 512"
FORWARDS = re.compile(r"(\d+) traces in (\d+) forwards")


def together(model: Model, log: Callable[[str], None]) -> list[list[str]]:
    """Rows: every way of putting short texts into forwards, on one model."""
    ways = get_args(Batching)
    config = TeacherConfig(store="unused", model=str(model.path))
    backends = [
        ReferenceBackend.load(msgspec.structs.replace(config, batching=how)) for how in ways
    ]
    growth = Growth(1, SHORT.before, SHORT.response, vocabulary=backends[0].vocab_size)
    traces = [one for seed in range(SHORT_TEXTS) for one in trajectory(growth, seed=seed)]
    sequences = assemble(traces)
    wanted = backends[0].score(sequences)
    for backend in backends[1:]:
        for result, alone in zip(backend.score(sequences), wanted, strict=True):
            apart = float(np.abs(result.logprobs - alone.logprobs).max())
            assert apart < TOLERANCE, f"{result.trace_id} differs by {apart} nats"
    seconds = alternate([lambda b=b: b.score(sequences) for b in backends], 3)  # type: ignore[misc]
    lengths = [len(one.ids) for one in sequences]
    scored = SHORT_TEXTS * SHORT.response
    rows = []
    for how, took in zip(ways, seconds, strict=True):
        forwards = len(groups(lengths, how, BATCH_TOKENS))
        rows.append(
            [
                f"{model.name}, {how}",
                f"{scored / took:,.0f}",
                f"{scored / forwards:,.0f}",
                f"{seconds[0] / took:.2f}",
            ]
        )
        log(f"{model.name}, {how}: {seconds[0] / took:.2f} times as fast as alone")
    return rows


def make_wide(root: Path, vocabulary: int) -> Path:
    """A dense model of two layers and a large head."""
    config = transformers.Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=HIDDEN,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2 * LENGTHS[-1],
    )
    path = root / f"wide-{vocabulary}"
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(
        path
    )
    return path


def peak(model: Path, tokens: int) -> None:
    """Entry point of a child: print the bytes that scoring adds to the peak of a loaded process."""
    torch.set_num_threads(THREADS)
    backend = ReferenceBackend.load(TeacherConfig(store="unused", model=str(model)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ids = np.arange(tokens + 1, dtype=np.int32) * 7919 % backend.vocab_size
    whole = Slice(trace_id="", prompt_len=1, response_ids=ids[1:])
    backend.score([Tokens(ids=ids[:-1], slices=(whole,))])
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)


def memory(root: Path, log: Callable[[str], None]) -> tuple[list[list[str]], Goal]:
    """Rows by vocabulary, columns by length; the goal is over vocabularies at the longest."""
    rows, longest = [], []
    for vocabulary in VOCABULARIES:
        path, found = make_wide(root, vocabulary), []
        for tokens in LENGTHS:
            code = f"from pathlib import Path; from benchmarks.scaling import peak; peak(Path({str(path)!r}), {tokens})"  # noqa: E501
            done = subprocess.run(
                [sys.executable, "-c", code],
                check=True,
                capture_output=True,
                text=True,
                env=os.environ | {"MALLOC_ARENA_MAX": "1"},
            )
            found.append(int(done.stdout))
            log(f"vocabulary {vocabulary:,}, {tokens:,} tokens: {found[-1] / 1e6:,.0f} MB more")
        whole = [f"{tokens * vocabulary * 4 / 1e6:,.0f}" for tokens in LENGTHS]
        rows.append([f"{vocabulary:,}", *(f"{one / 1e6:,.0f}" for one in found), *whole])
        longest.append(found[-1] / (LENGTHS[-1] * vocabulary * 4))
    worst = max(longest)
    goal = Goal(
        f"memory of a forward over {LENGTHS[-1]:,} tokens against whole float32 logits",
        "at most 1/2",
        f"{worst:.2f}",
        worst <= 0.5,
    )
    return rows, goal


def make_queue(root: Path, model: Model) -> Path:
    """A store of single calls of different trajectories."""
    vocabulary = int(transformers.AutoConfig.from_pretrained(model.path).vocab_size)
    growth = Growth(1, QUEUE_TEXT.before, QUEUE_TEXT.response, vocabulary=vocabulary)
    with closing(Writer(root)) as writer:
        for seed in range(QUEUE):
            for trace in trajectory(growth, seed=seed):
                writer.submit(trace).result(timeout=30)
    return root


def drain(store: Path, model: Model, workers: int) -> float:
    """Seconds in which ``workers`` processes score a copy of ``store``; nothing twice, all of it.

    From the first stored score to the last: a start of torch is not the queue's work.
    """
    command = [sys.executable, "-m", "driftgate.cli", "teach", "--model", str(model.path)]
    command += ["--store", str(store), "--no-replay"]
    environment = os.environ | {"OMP_NUM_THREADS": str(THREADS)}
    running: list[subprocess.Popen[Any]] = [
        subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
        for _ in range(workers)
    ]
    assert [process.wait(timeout=540) for process in running] == [0] * workers
    with closing(Reader(store)) as reader:
        metas = [row.meta for row in reader.scores(kind="drift", limit=10_000)]
    times = Counter(meta.trace_id for meta in metas)
    assert len(times) == QUEUE, f"{len(times)} of {QUEUE} traces are scored"
    assert set(times.values()) == {1}, "a trace was scored twice"
    return (max(meta.scored_ns for meta in metas) - min(meta.scored_ns for meta in metas)) / 1e9


def workers(root: Path, models: Sequence[Model], log: Callable[[str], None]) -> list[list[str]]:
    """Rows: one worker and two on the same queue."""
    (model,) = (one for one in models if one.name == QUEUE_MODEL)
    queue = make_queue(root / "queue", model)
    seconds = []
    for count in (1, 2):
        copy = Path(shutil.copytree(queue, root / f"queue-{count}"))
        started = time.perf_counter()
        seconds.append(drain(copy, model, count))
        log(f"{count} workers: {seconds[-1]:.1f} s, {time.perf_counter() - started:.1f} s in all")
    return [
        [str(count), f"{took:.1f}", f"{seconds[0] / took:.2f}"]
        for count, took in zip((1, 2), seconds, strict=True)
    ]


def run(log: Callable[[str], None]) -> Section:
    """All three."""
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory(prefix="driftgate-bench-") as folder:
        root = Path(folder)
        models = make_models(root)
        batched = [row for model in models for row in together(model, log)]
        sizes, goal = memory(root, log)
        queued = workers(root, models, log)
    return Section(
        name="scaling",
        title="Teacher: company, memory, workers",
        how=HOW,
        tables=[
            Table(
                f"{SHORT_TEXTS} texts of {SHORT.before} + {SHORT.response} tokens",
                ["model and way", "scored tokens/s", "a forward", "times faster than alone"],
                batched,
            ),
            Table(
                "MB that scoring adds to the peak of a loaded process",
                [
                    "vocabulary",
                    *(f"{tokens:,} tokens" for tokens in LENGTHS),
                    *(f"whole logits, {tokens:,}" for tokens in LENGTHS),
                ],
                sizes,
            ),
            Table(
                f"{QUEUE} trajectories, {QUEUE_MODEL}",
                ["workers", "s from first to last score", "times faster"],
                queued,
            ),
        ],
        goals=[goal],
        notes=[f"torch {torch.__version__}, {THREADS} thread a process, bfloat16."],
    )


HOW = """\
Random models, random texts. `padded` and `packed` give the log-probabilities of `alone` (checked
first, within bfloat16's rounding) and are labelled in the trainer's fingerprint. Memory is the
growth of ru_maxrss over one forward in a process of its own that has loaded the model. Workers are
`driftgate teach` processes on one store; each trace is scored exactly once (checked)."""
