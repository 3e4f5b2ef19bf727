"""Scored tokens a second of the teacher against a bare Hugging Face forward over the same texts.

And one pass over a trajectory against one pass for each of its steps.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from benchmarks.report import Goal, Section, Table
from benchmarks.trajectories import Growth, trajectory
from driftgate.teacher.config import TeacherConfig
from driftgate.teacher.reference import ReferenceBackend, load_model
from driftgate.teacher.sequences import Sequence as Tokens
from driftgate.teacher.sequences import assemble
from driftgate.testing.checkpoints import make_checkpoint
from driftgate.trace import Trace

__all__ = ["run"]

THREADS = 1
"""Two threads that wait for each other measure the other processes of a busy machine."""

REPEATS = 4
GOAL = 0.8
TOLERANCE = 2e-2
"""Nats between both ways: they slice the head differently, and bfloat16 rounds."""

TEXT_TURNS = Growth(turns=1, before=512, response=512)
TEXTS = 2
TURNS = (5, 20, 50)
TURN = Growth(turns=1, before=20, response=30)


@dataclass(frozen=True, slots=True)
class Model:
    """A checkpoint and what to call it."""

    name: str
    path: Path


def make_models(root: Path) -> list[Model]:
    """The tests' tiny checkpoints, and two where overhead is not everything."""
    small = {
        "vocab_size": 32_000,
        "hidden_size": 512,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
    }
    dense = transformers.Qwen3Config(**small, intermediate_size=1536)
    moe = transformers.Qwen3MoeConfig(
        **small,
        intermediate_size=1536,
        num_experts=32,
        num_experts_per_tok=4,
        moe_intermediate_size=384,
        norm_topk_prob=True,
    )
    models = [
        Model("tiny dense", make_checkpoint(root / "tiny-dense", "dense")),
        Model("tiny MoE", make_checkpoint(root / "tiny-moe", "moe")),
    ]
    for name, config in (("dense, 8 x 512", dense), ("MoE, 8 x 512, 4 of 32", moe)):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        path = root / name.replace(" ", "").replace(",", "-")
        model.save_pretrained(path)
        models.append(Model(name, path))
    return models


def load(model: Model) -> ReferenceBackend:
    """The worker's backend with its default settings."""
    return ReferenceBackend.load(TeacherConfig(store="unused", model=str(model.path)))


def load_bare(model: Model) -> Any:
    """The same weights in the same precision, with the same attention and experts, and no hooks."""
    config = TeacherConfig(store="unused", model=str(model.path))
    return load_model(config).eval()


@torch.no_grad()
def bare_logprobs(model: Any, sequence: Tokens) -> list[torch.Tensor]:
    """The usual few lines: all logits, log_softmax in float32, gather the response tokens."""
    logits = model(input_ids=torch.from_numpy(sequence.ids).long()[None], use_cache=False).logits[0]
    found = []
    for part in sequence.slices:
        targets = torch.from_numpy(part.response_ids).long()[:, None]
        log_probs = logits[part.first : part.last].float().log_softmax(-1)
        found.append(log_probs.gather(-1, targets)[:, 0])
    return found


def texts(vocabulary: int) -> list[Trace]:
    """Single calls of different trajectories."""
    growth = Growth(TEXT_TURNS.turns, TEXT_TURNS.before, TEXT_TURNS.response, vocabulary=vocabulary)
    return [trace for seed in range(TEXTS) for trace in trajectory(growth, seed=seed)]


def alternate(ways: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Seconds of each way, the best of ``repeats``, measured in turns."""
    best = [math.inf] * len(ways)
    for _ in range(repeats):
        for i, way in enumerate(ways):
            started = time.perf_counter()
            way()
            best[i] = min(best[i], time.perf_counter() - started)
    return best


def check(backend: ReferenceBackend, bare: Any, sequences: Sequence[Tokens]) -> None:
    """Both ways give the same numbers, or there is nothing to compare."""
    wanted = [values.numpy() for sequence in sequences for values in bare_logprobs(bare, sequence)]
    for result, values in zip(backend.score(sequences), wanted, strict=True):
        worst = float(np.abs(result.logprobs - values).max())
        assert worst < TOLERANCE, f"{result.trace_id} differs by {worst} nats"


def against_bare(
    models: Sequence[Model], log: Callable[[str], None]
) -> tuple[list[list[str]], list[Goal]]:
    """Rows and goals: the backend and the bare forward over the same texts."""
    rows, goals = [], []
    for model in models:
        backend, bare = load(model), load_bare(model)
        sequences = assemble(texts(backend.vocab_size))
        check(backend, bare, sequences)
        ours, theirs = alternate(
            [
                lambda backend=backend, sequences=sequences: backend.score(sequences),  # type: ignore[misc]
                lambda bare=bare, sequences=sequences: [  # type: ignore[misc]
                    bare_logprobs(bare, sequence) for sequence in sequences
                ],
            ],
            REPEATS,
        )
        scored = sum(len(part.response_ids) for sequence in sequences for part in sequence.slices)
        rows.append(
            [
                model.name,
                f"{scored / theirs:,.0f}",
                f"{scored / ours:,.0f}",
                f"{scored / len(sequences):,.0f}",
                f"{theirs / ours:.2f}",
            ]
        )
        goals.append(
            Goal(
                f"scored tokens a second against a bare forward, {model.name}",
                f"at least {GOAL}",
                f"{theirs / ours:.2f}",
                theirs / ours >= GOAL,
            )
        )
        log(f"{model.name}: {theirs / ours:.2f} of the bare forward")
    return rows, goals


def one_pass(model: Model, log: Callable[[str], None]) -> list[list[str]]:
    """Rows: one forward for a trajectory against one for each step."""
    backend, rows = load(model), []
    for turns in TURNS:
        growth = Growth(turns, TURN.before, TURN.response, vocabulary=backend.vocab_size)
        traces = trajectory(growth)
        together = assemble(traces)
        alone = [sequence for trace in traces for sequence in assemble([trace])]
        assert (len(together), len(alone)) == (1, turns)
        once, each = alternate(
            [
                lambda together=together: backend.score(together),  # type: ignore[misc]
                lambda alone=alone: backend.score(alone),  # type: ignore[misc]
            ],
            1 if turns == TURNS[-1] else 3,
        )
        scored = turns * TURN.response
        rows.append(
            [
                f"{model.name}, {turns} turns, {growth.tokens:,} tokens",
                f"{scored / each:,.0f}",
                f"{scored / once:,.0f}",
                f"{each / once:.1f}",
            ]
        )
        log(f"{model.name}: one pass is {each / once:.1f} times faster at {turns} turns")
    return rows


def run(log: Callable[[str], None]) -> Section:
    """Both comparisons on every model."""
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory(prefix="driftgate-bench-") as folder:
        models = make_models(Path(folder))
        rows, goals = against_bare(models, log)
        factors = [row for model in models[:1] + models[2:3] for row in one_pass(model, log)]
    return Section(
        name="teacher",
        title="Teacher",
        how=HOW,
        tables=[
            Table(
                f"{TEXTS} texts of {TEXT_TURNS.before} + {TEXT_TURNS.response} tokens",
                ["model", "bare, scored tokens/s", "reference backend", "a forward", "ratio"],
                rows,
            ),
            Table(
                f"A trajectory with {TURN.before} + {TURN.response} new tokens a turn",
                ["trajectory", "one pass a step, scored tokens/s", "one pass", "times faster"],
                factors,
            ),
        ],
        goals=goals,
        notes=[f"torch {torch.__version__}, {THREADS} thread, bfloat16."],
    )


HOW = """\
Random models, random texts. *Bare* is `model(ids).logits`, `log_softmax` in float32 and `gather`
over the response tokens, with the same precision, attention and experts as the backend; the
reference backend also gives the entropy and, for a MoE model, every router's choices and margins.
Both give the same log-probabilities (checked first). Ways are measured in turns, best of each."""
