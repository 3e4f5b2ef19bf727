"""NeMo-RL: one ``message_log`` a line, with routes in its own envelope.

Checked against NVIDIA-NeMo/RL: ``nemo_rl/utils/routed_experts_codec.py`` at commit 0cbe0ac (the
envelope ``nrlre1:<dtype>:<S>x<L>x<K>:<base64>``, narrowest signed integer) and
``nemo_rl/models/megatron/router_replay.py`` at commit 09f0393 (a row of -1 is routed natively). As
in its NeMo Gym path, a log alternates context and answer, every message carries the routes of its
own tokens, and only answers have ``generation_logprobs``. The last sampled token has a row of -1.
NeMo-RL's package on PyPI is empty, so the tests hold the file against the written envelope.

NeMo-RL has no file of its own for logs: this is JSON with lists where it has tensors.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from driftgate.adapters.export_base import Format, all_routes, padded_routes, sample_of
from driftgate.samples import Sample, SampleMeta

__all__ = ["FORMAT", "decode_routes", "encode_routes"]

MAGIC = "nrlre1"
SIGNED = ("int8", "int16", "int32")


class Message(msgspec.Struct, omit_defaults=True):
    """Context between answers, or one answer."""

    role: str
    token_ids: list[int]
    content: str = ""
    token_loss_mask: list[int] = []
    generation_logprobs: list[float] | None = None
    routed_experts: str | None = None


class Line(msgspec.Struct):
    """One sample."""

    message_log: list[Message]
    length: int
    reward: float | None
    idx: int


def encode_routes(routes: npt.NDArray[Any]) -> str:
    """The envelope of signed expert ids [S, L, K]."""
    shape = "x".join(map(str, routes.shape))
    data = base64.b64encode(np.ascontiguousarray(routes).data).decode()
    return f"{MAGIC}:{routes.dtype.name}:{shape}:{data}"


def decode_routes(envelope: str) -> npt.NDArray[Any]:
    """Expert ids [S, L, K] of an envelope. ValueError where it is none."""
    parts = envelope.split(":", 3)
    if len(parts) != 4 or parts[0] != MAGIC or parts[1] not in SIGNED:
        raise ValueError(f"{envelope[:40]!r} is no {MAGIC}:<dtype>:<S>x<L>x<K>:<base64>")
    shape = [int(size) for size in parts[2].split("x")]
    data = base64.b64decode(parts[3], validate=True)
    return np.frombuffer(data, parts[1]).reshape(shape)


def _narrowest(sample: Sample) -> npt.DTypeLike:
    assert sample.routes is not None
    largest = int(sample.routes.max(initial=0))
    return next(np.dtype(name) for name in SIGNED if largest <= np.iinfo(name).max)


def _messages(sample: Sample) -> Iterator[Message]:
    rows = (
        None
        if sample.routes is None
        else padded_routes(sample, sample.meta.tokens, _narrowest(sample))
    )
    at = 0
    for span in sample.meta.spans:
        for start, end, answer in ((at, span.start, False), (span.start, span.end, True)):
            if start == end:
                continue
            yield Message(
                role="assistant" if answer else "user",
                token_ids=sample.tokens[start:end].tolist(),
                token_loss_mask=[int(answer)] * (end - start),
                generation_logprobs=sample.logprobs[start:end].tolist() if answer else None,
                routed_experts=None if rows is None else encode_routes(rows[start:end]),
            )
        at = span.end


def _write(path: Path, samples: Sequence[Sample]) -> None:
    with path.open("wb") as file:
        for index, sample in enumerate(samples):
            line = Line(list(_messages(sample)), sample.meta.tokens, sample.meta.reward, index)
            file.write(msgspec.json.encode(line) + b"\n")


def _read(path: Path, metas: Sequence[SampleMeta]) -> list[Sample]:
    with path.open("rb") as file:
        lines = [msgspec.json.decode(text, type=Line) for text in file]
    return [_sample(meta, line) for meta, line in zip(metas, lines, strict=True)]


def _sample(meta: SampleMeta, line: Line) -> Sample:
    tokens, mask, logprobs, envelopes = list[int](), list[int](), list[float](), list[str]()
    for message in line.message_log:
        tokens += message.token_ids
        mask += message.token_loss_mask
        logprobs += message.generation_logprobs or [0.0] * len(message.token_ids)
        envelopes += [message.routed_experts] if message.routed_experts else []
    routes = np.concatenate([decode_routes(text) for text in envelopes]) if envelopes else None
    return sample_of(meta, tokens, mask, logprobs, routes)


FORMAT = Format(
    name="nemo-rl",
    write=_write,
    read=_read,
    carries=all_routes,
    shard_name="shard-{:05d}.jsonl",
    route_bytes=4,
)
