"""A bias that is none: one engine scales its logprobs by the temperature, the other does not.

Both sides sampled at T = 0.7 from the same weights that the trainer holds. One recorded its
logprobs before the temperature (vLLM's default), the other after it (SGLang's). A comparison that
scores both at T = 1 finds the second one several nats off in every answer, and blames the engine:
a public dashboard reported such a bias of -4.7 nats. How large it is follows from the texts.

    python -m examples.temperature_trap

prints that comparison, and beside it what driftgate says of the same records. Nothing is simulated:
a tiny checkpoint samples, and the reference trainer scores what was stored.
"""

from __future__ import annotations

import tempfile
import threading
from contextlib import closing
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from driftgate.storage import Reader, Writer
from driftgate.teacher.config import TeacherConfig
from driftgate.teacher.reference import ReferenceBackend
from driftgate.teacher.worker import Worker
from driftgate.testing.checkpoints import make_checkpoint
from driftgate.trace import Engine, LogprobsMode, Reason, Sampling, Score, Trace, TraceMeta

__all__ = ["Finding", "main", "run"]

TEMPERATURE = 0.7
ANSWERS, PROMPT_TOKENS, ANSWER_TOKENS = 24, 16, 48

Recorded = Literal["raw", "scaled"]

CASES: tuple[tuple[str, Recorded, LogprobsMode], ...] = (
    ("records before T, says so", "raw", "raw_logprobs"),
    ("records after T, taken for raw", "scaled", "raw_logprobs"),
    ("records after T, says so", "scaled", "processed_logprobs"),
    ("records after T, says nothing", "scaled", "unknown"),
)


class Finding(NamedTuple):
    """One engine's answers, compared in both ways."""

    name: str
    naive_bias: float
    """Nats an answer: the trainer at T = 1 minus what was recorded, summed, then averaged."""
    verdicts: set[str]
    reasons: dict[str, Reason]
    """By code; an example of each."""
    scores: list[Score]

    @property
    def mean_abs(self) -> float:
        """mean|D| of driftgate's own comparison, nats a token."""
        buckets = [score.meta.bucket for score in self.scores if score.meta.bucket]
        return sum(b.sum_abs for b in buckets) / sum(b.n_tokens for b in buckets)


class Said(NamedTuple):
    """One sampled answer, with both of its engines' logprobs."""

    prompt: list[int]
    response: list[int]
    logprobs: dict[Recorded, Any]
    """[R] nats of each token."""


@torch.no_grad()
def sample(model_dir: Path) -> list[Said]:
    """Answers at ``TEMPERATURE``, token by token, as an engine makes them."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(10, 1900, (ANSWERS, PROMPT_TOKENS), generator=generator)
    ids, raw, scaled, cache = prompts, [], [], None
    for _ in range(ANSWER_TOKENS):
        fed = ids if cache is None else ids[:, -1:]
        out = model(input_ids=fed, past_key_values=cache, use_cache=True)
        cache, logits = out.past_key_values, out.logits[:, -1].float()
        density = (logits / TEMPERATURE).log_softmax(-1)
        token = torch.multinomial(density.exp(), 1, generator=generator)
        raw.append(logits.log_softmax(-1).gather(-1, token))
        scaled.append(density.gather(-1, token))
        ids = torch.cat([ids, token], dim=1)
    both = {"raw": torch.cat(raw, 1).numpy(), "scaled": torch.cat(scaled, 1).numpy()}
    return [
        Said(
            prompt=prompts[n].tolist(),
            response=ids[n, PROMPT_TOKENS:].tolist(),
            logprobs={"raw": both["raw"][n], "scaled": both["scaled"][n]},
        )
        for n in range(ANSWERS)
    ]


def trace(said: Said, number: int, recorded: Recorded, mode: LogprobsMode) -> Trace:
    """The answer as a gateway would have stored it."""
    meta = TraceMeta(
        trace_id=f"{number}.0",
        call_id=str(number),
        trajectory=f"run-{number}",
        step=0,
        choice=0,
        api="completions",
        model="tiny",
        attribution="url",
        engine=Engine(name="engine", version="1", model="tiny", logprobs_mode=mode),
        weight_version="1",
        sampling=Sampling(
            temperature=TEMPERATURE, top_p=1.0, top_k=0, min_p=0.0, repetition_penalty=1.0
        ),
        streamed=False,
        started_ns=number + 1,
        ended_ns=number + 2,
    )
    return Trace(
        meta=meta,
        prompt_ids=np.asarray(said.prompt, np.int32),
        response_ids=np.asarray(said.response, np.int32),
        logprobs=np.asarray(said.logprobs[recorded], np.float32),
        routes=None,
        token_bytes=b"",
        token_offsets=None,
        request=b"{}",
        response=b"{}",
    )


def run(root: Path) -> list[Finding]:
    """Every case, each in a store of its own under ``root``."""
    model_dir = make_checkpoint(root / "model", "dense", dtype="float32")
    answers = sample(model_dir)
    backend = ReferenceBackend.load(TeacherConfig(store="unused", model=str(model_dir)))
    found = []
    for number, (name, recorded, mode) in enumerate(CASES):
        traces = [trace(said, n, recorded, mode) for n, said in enumerate(answers)]
        found.append(_compare(name, root / f"store-{number}", traces, model_dir, backend))
    return found


def _compare(
    name: str, store: Path, traces: list[Trace], model_dir: Path, backend: ReferenceBackend
) -> Finding:
    with closing(Writer(store)) as writer:
        for pending in [writer.submit(one) for one in traces]:
            pending.result()
    config = TeacherConfig(store=str(store), model=str(model_dir), weight_version="1")
    with closing(Worker(config, backend)) as worker:
        worker.run(threading.Event())
    with closing(Reader(store)) as reader:
        scores = [reader.score(one.meta.trace_id) for one in traces]
    sums = [
        float((score.logprobs.astype(np.float64) - one.logprobs).sum())
        for score, one in zip(scores, traces, strict=True)
        if one.logprobs is not None
    ]
    judged = [score.meta.comparable for score in scores]
    return Finding(
        name=name,
        naive_bias=float(np.mean(sums)),
        verdicts={one.verdict for one in judged},
        reasons={reason.code: reason for one in judged for reason in one.reasons},
        scores=scores,
    )


def main() -> None:
    """Print the trap, and what driftgate makes of it."""
    with tempfile.TemporaryDirectory(prefix="driftgate-trap-") as scratch:
        for found in run(Path(scratch)):
            print(f"an engine that {found.name}")
            bias = round(found.naive_bias, 2) + 0.0  # no minus zero
            print(f"  scored at T = 1, whatever was recorded: {bias:+.2f} nats an answer")
            verdicts = ", ".join(sorted(found.verdicts))
            print(f"  driftgate: comparable {verdicts}, mean|D| {found.mean_abs:.2g} nats a token")
            for code, reason in found.reasons.items():
                if code != "low_power":
                    print(f"    {code}: {reason.detail}")


if __name__ == "__main__":
    main()
