"""What scoring costs, as far as a busy machine can tell: positions fed, memory, processor time.

`benchmarks teacher` and `scaling` have the figures of a quiet machine. Here stand the ones that
are the same on any, and bounds on processor time, which waiting for others does not change.
"""

from __future__ import annotations

import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks import scaling, teacher
from benchmarks.trajectories import Growth, trajectory
from driftgate.teacher.batches import Batching, groups
from driftgate.teacher.config import BATCH_TOKENS
from driftgate.teacher.sequences import assemble
from driftgate.testing.checkpoints import make_checkpoint
from science.launched import TIMEOUT_S
from science.table import Row, at_least, at_most, exactly

__all__ = ["costs"]

SLOWEST = 0.7
"""Of a bare forward's tokens a second of processor time; the routers' choices are among it."""
FACTORS = {5: 2.0, 20: 5.0, 50: 9.0}
"""Times that one pass must be faster than one pass a step; about half of what was measured."""
WASTE = 1.01
"""Of the least padding that so many forwards can have."""
REPEATS = 3
SHORT, LONG = 1024, 4096
"""Half of the lengths of the benchmark, which takes minutes for them."""
LARGEST = scaling.VOCABULARIES[-1]


def costs(part: str, root: Path) -> Iterator[Row]:
    """One pass against one a step, batches by length, a bare forward, and memory."""
    torch.set_num_threads(teacher.THREADS)
    models = [
        teacher.Model("tiny dense", make_checkpoint(root / "dense", "dense")),
        teacher.Model("tiny MoE", make_checkpoint(root / "moe", "moe")),
    ]
    yield from _one_pass(part, models[0])
    yield from _batches(part)
    for model in models:
        yield _against_bare(part, model)
    yield from _memory(part, root)


def _processor_s(work: Callable[[], object], repeats: int = REPEATS) -> float:
    """Processor seconds of this process, the least of ``repeats``."""
    taken = []
    for _ in range(repeats):
        started = time.process_time()
        work()
        taken.append(time.process_time() - started)
    return min(taken)


def _one_pass(part: str, model: teacher.Model) -> Iterator[Row]:
    backend = teacher.load(model)
    turn = teacher.TURN
    for turns, factor in FACTORS.items():
        growth = Growth(turns, turn.before, turn.response, vocabulary=backend.vocab_size)
        traces = trajectory(growth)
        once = assemble(traces)
        each = [sequence for trace in traces for sequence in assemble([trace])]
        fed = [sum(len(one.ids) for one in way) for way in (once, each)]
        grows = turn.before + turn.response
        # The last sampled token of a forward is not fed.
        by_hand = sum(grows * n - 1 for n in range(1, turns + 1)) / (grows * turns - 1)
        what = f"{turns} turns: positions fed by a pass a step, of those of one pass"
        yield exactly(part, what, fed[1] / fed[0], by_hand)
        a, b = (_processor_s(lambda way=way: backend.score(way)) for way in (once, each))  # type: ignore[misc]
        yield at_least(
            part, f"{turns} turns: times faster in one pass, {model.name}", b / a, factor
        )


def _batches(part: str) -> Iterator[Row]:
    """Forwards of 64 sequences between 16 and 1,000 positions, and the padding in them."""
    lengths = [16 + (n * 7919) % 985 for n in range(64)]
    ways: tuple[Batching, ...] = ("alone", "padded", "packed")
    for how in ways:
        found = groups(lengths, how, BATCH_TOKENS)
        every = sorted(index for group in found for index in group)
        yield exactly(
            part, f"{how}: sequences in a forward, each once", every == [*range(64)], True
        )
        fed = [
            max(lengths[i] for i in group) * len(group)
            if how == "padded"
            else sum(lengths[i] for i in group)
            for group in found
        ]
        yield at_most(part, f"{how}: positions of the largest forward", max(fed), BATCH_TOKENS)
        waste = sum(fed) / sum(lengths)
        least = _least_padded(lengths, len(found)) / sum(lengths) if how == "padded" else 1.0
        what = f"{how}: positions fed for each that is asked for"
        yield at_most(part, what, waste, least * WASTE)
        yield at_most(part, f"{how}: forwards", len(found), 64 if how == "alone" else 6)


def _least_padded(lengths: list[int], forwards: int) -> float:
    """Positions of the best of all ways to cut the sorted lengths into so many padded forwards."""
    longest = sorted(lengths, reverse=True)
    best = [0.0] + [math.inf] * len(longest)
    for _ in range(forwards):
        best = [
            min(
                (
                    best[start] + longest[start] * (end - start)
                    for start in range(end)
                    if longest[start] * (end - start) <= BATCH_TOKENS
                ),
                default=0.0,
            )
            for end in range(len(best))
        ]
    return best[-1]


def _against_bare(part: str, model: teacher.Model) -> Row:
    backend, bare = teacher.load(model), teacher.load_bare(model)
    sequences = assemble(teacher.texts(backend.vocab_size))
    teacher.check(backend, bare, sequences)
    ours = _processor_s(lambda: backend.score(sequences))
    theirs = _processor_s(lambda: [teacher.bare_logprobs(bare, one) for one in sequences])
    what = f"tokens a second of processor time, of plain Hugging Face's: {model.name}"
    return at_least(part, what, theirs / ours, SLOWEST)


def _memory(part: str, root: Path) -> Iterator[Row]:
    """MB that scoring adds at its peak, against whole logits in float32."""
    found: dict[tuple[int, int], float] = {}
    for vocabulary, tokens in ((LARGEST, SHORT), (LARGEST, LONG), (scaling.VOCABULARIES[0], LONG)):
        path = scaling.make_wide(root, vocabulary)
        code = f"from benchmarks.scaling import peak; peak({str(path)!r}, {tokens})"
        done = subprocess.run(
            [sys.executable, "-c", code],
            check=True,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
        found[vocabulary, tokens] = int(done.stdout) / 1e6
    whole = LARGEST * LONG * 4 / 1e6
    what = f"MB for {LONG:,} tokens of {LARGEST:,} ids (whole logits: {whole:,.0f})"
    yield at_most(part, what, found[LARGEST, LONG], scaling.WHOLE_GOAL * whole)
    what = f"MB for {LONG:,} tokens, of those for {SHORT:,}"
    grown = found[LARGEST, LONG] / found[LARGEST, SHORT]
    yield at_most(part, what, grown, scaling.LENGTH_GOAL)
    few = scaling.VOCABULARIES[0]
    more = found[LARGEST, LONG] - found[few, LONG]
    # The head runs over 1,024 positions at once: its logits, and no more than their copy.
    chunk = (LARGEST - few) * 1024 * 4 / 1e6
    yield at_most(part, f"MB more than for {few:,} ids", more, chunk)
