"""What scoring costs with length, vocabulary, company and workers.

Several sequences in one forward against one each, checked to be equal up to a tie of a router; peak
memory of a process by vocabulary and length; one worker on a queue against two.
"""

from __future__ import annotations

import os
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
from benchmarks.teacher import THREADS, Model, alternate, make_models
from benchmarks.trajectories import Growth, trajectory
from driftgate.storage import Reader, Writer
from driftgate.teacher.base import SliceResult
from driftgate.teacher.batches import Batching, groups
from driftgate.teacher.config import BATCH_TOKENS, TeacherConfig
from driftgate.teacher.reference import ReferenceBackend
from driftgate.teacher.sequences import Sequence as Tokens
from driftgate.teacher.sequences import Slice, assemble

__all__ = ["run"]

SHORT = Growth(turns=1, before=32, response=32)
SHORT_TEXTS = 64
TILING = 1e-4
"""Nats between alone and in company, float32, on random ids, whose logprobs are -30."""

VOCABULARIES = (32_768, 151_936)
LENGTHS = (2048, 8192)
HIDDEN = 256
WHOLE_GOAL = 0.5
"""Of whole logits in float32, which are 5.0 GB for the larger vocabulary at 8k tokens."""
LENGTH_GOAL = 1.5
"""From the shorter to the longer, where whole logits grow four times: hidden states are kept."""

QUEUE = 48
QUEUE_TEXT = Growth(turns=1, before=512, response=512)
QUEUE_MODEL = "dense, 8 x 512"


def load(config: TeacherConfig, how: Batching) -> ReferenceBackend:
    """The reference that puts sequences together so."""
    return ReferenceBackend.load(msgspec.structs.replace(config, batching=how))


def unflipped(one: SliceResult, other: SliceResult) -> int:
    """Tokens before the first whose experts differ: the last bits of a forward decide between two
    that are as good as equal, and what follows attends to the token."""
    if one.routes is None or other.routes is None:
        return len(one.logprobs)
    differ = (np.sort(one.routes, axis=-1) != np.sort(other.routes, axis=-1)).any(axis=(1, 2))
    return int(differ.argmax()) if differ.any() else len(one.logprobs)


def together(model: Model, log: Callable[[str], None]) -> list[list[str]]:
    """Rows: every way of putting short texts into forwards, on one model."""
    ways = get_args(Batching)
    config = TeacherConfig(store="unused", model=str(model.path))
    backends = [load(config, how) for how in ways]
    growth = Growth(1, SHORT.before, SHORT.response, vocabulary=backends[0].vocab_size)
    traces = [one for seed in range(SHORT_TEXTS) for one in trajectory(growth, seed=seed)]
    sequences = assemble(traces)
    # In float32: in bfloat16 company alone moves random ids by up to .3 nats, as any other shape.
    wide = msgspec.structs.replace(config, dtype="float32")
    wanted, *others = (load(wide, how).score(sequences) for how in ways)
    for how, found in zip(ways[1:], others, strict=True):
        for result, alone in zip(found, wanted, strict=True):
            kept = unflipped(result, alone)
            apart = float(np.abs(result.logprobs - alone.logprobs)[:kept].max(initial=0.0))
            assert apart < TILING, f"{how}: {result.trace_id} differs by {apart} nats"
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
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(path)
    return path


def peak(model: str, tokens: int) -> None:
    """Entry point of a child: print the bytes that scoring adds at its peak to a loaded process."""
    torch.set_num_threads(THREADS)
    backend = ReferenceBackend.load(TeacherConfig(store="unused", model=model))
    ids = np.arange(tokens + 1, dtype=np.int32) * 7919 % backend.vocab_size
    whole = Slice(trace_id="", prompt_len=1, response_ids=ids[1:])
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew: loading had one too
    before = status_bytes("VmRSS")
    backend.score([Tokens(ids=ids[:-1], slices=(whole,))])
    print(status_bytes("VmHWM") - before)


def status_bytes(field: str) -> int:
    """A size in /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (kib,) = (line.split()[1] for line in lines if line.startswith(f"{field}:"))
    return int(kib) * 1024


def memory(root: Path, log: Callable[[str], None]) -> tuple[list[list[str]], list[Goal]]:
    """Rows by vocabulary, columns by length; goals for the larger vocabulary."""
    rows, found = [], list[int]()
    for vocabulary in VOCABULARIES:
        path, found = make_wide(root, vocabulary), []
        for tokens in LENGTHS:
            code = f"from benchmarks.scaling import peak; peak({str(path)!r}, {tokens})"
            done = subprocess.run(
                [sys.executable, "-c", code], check=True, capture_output=True, text=True
            )
            found.append(int(done.stdout))
            log(f"vocabulary {vocabulary:,}, {tokens:,} tokens: {found[-1] / 1e6:,.0f} MB more")
        whole = [f"{tokens * vocabulary * 4 / 1e6:,.0f}" for tokens in LENGTHS]
        rows.append([f"{vocabulary:,}", *(f"{one / 1e6:,.0f}" for one in found), *whole])
    share = found[-1] / (LENGTHS[-1] * VOCABULARIES[-1] * 4)
    growth = found[-1] / found[0]
    return rows, [
        Goal(
            f"memory of a forward, {VOCABULARIES[-1]:,} ids, against whole logits",
            f"at most {WHOLE_GOAL}",
            f"{share:.2f}",
            share <= WHOLE_GOAL,
        ),
        Goal(
            f"memory of {LENGTHS[-1]:,} tokens against {LENGTHS[0]:,}, {VOCABULARIES[-1]:,} ids",
            f"at most {LENGTH_GOAL}",
            f"{growth:.2f}",
            growth <= LENGTH_GOAL,
        ),
    ]


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
        sizes, goals = memory(root, log)
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
        goals=goals,
        notes=[f"torch {torch.__version__}, {THREADS} thread a process, bfloat16."],
    )


HOW = """\
Random models, random texts. `padded` and `packed` give the log-probabilities of `alone` (checked
first, in float32, up to where two experts tie) and are labelled in the trainer's fingerprint.
Memory is the peak of one forward over what its process holds after loading (VmHWM, started
anew). Workers are `driftgate teach` processes on one store; each trace is scored exactly once
(checked)."""
