"""The oracle against plain Hugging Face: whole logits in float64, no shared code."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3Config, Llama4TextConfig

from driftgate.errors import TeacherError
from driftgate.teacher.base import SliceResult
from driftgate.teacher.config import TeacherConfig
from driftgate.teacher.reference import ReferenceBackend, pick_device
from driftgate.teacher.sequences import Sequence, Slice
from driftgate.testing.checkpoints import CheckpointKind

EXACT = 1e-6
"""Nats, float32 log-sum-exp against float64 over the same logits, for values below 16."""
ONE_PASS = 1e-4
"""Nats, float32. A longer sequence changes the tiling of matrix products: 2e-5 was measured."""


@pytest.fixture(scope="module", params=["dense", "moe"])
def kind(request: pytest.FixtureRequest) -> CheckpointKind:
    chosen: CheckpointKind = request.param
    return chosen


@pytest.fixture(scope="module")
def backend(checkpoints: dict[CheckpointKind, Path], kind: CheckpointKind) -> ReferenceBackend:
    config = TeacherConfig(store="unused", model=str(checkpoints[kind]), dtype="float32")
    return ReferenceBackend.load(config)


def tokens(count: int) -> npt.NDArray[np.int32]:
    return np.random.default_rng(count).integers(0, 1990, count).astype(np.int32)


def one(
    ids: npt.NDArray[np.int32],
    prompt_len: int,
    end: int | None = None,
    temperature: float | None = None,
) -> Slice:
    return Slice(
        trace_id=f"{prompt_len}",
        prompt_len=prompt_len,
        response_ids=ids[prompt_len:end],
        temperature=temperature,
    )


def test_scores_equal_whole_float64_logits(
    backend: ReferenceBackend, checkpoints: dict[CheckpointKind, Path], kind: CheckpointKind
) -> None:
    ids, P = tokens(150), 50
    (result,) = backend.score([Sequence(ids=ids[:-1], slices=(one(ids, P, temperature=0.7),))])
    model = AutoModelForCausalLM.from_pretrained(checkpoints[kind], dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(torch.from_numpy(ids[:-1]).long()[None]).logits[0, P - 1 :].double()
    target = torch.from_numpy(ids[P:]).long()[:, None]
    full = logits.log_softmax(-1)
    close(result.logprobs, full.gather(-1, target)[:, 0])
    close(result.entropy, -(full.exp() * full).sum(-1), 3 * EXACT)
    assert result.at_temperature is not None
    close(result.at_temperature, (logits / 0.7).log_softmax(-1).gather(-1, target)[:, 0], 3 * EXACT)


def close(ours: npt.NDArray[np.float32], wanted: torch.Tensor, tolerance: float = EXACT) -> None:
    error = np.abs(ours - wanted.numpy())
    # One unit in the last place of a float32 near -16 is 1.9e-6: relative above 1.
    assert (error / np.maximum(1.0, np.abs(wanted.numpy()))).max() < tolerance


def test_one_pass_equals_one_forward_per_step(backend: ReferenceBackend) -> None:
    ids = tokens(600)
    parts = [one(ids, start, start + 40) for start in range(50, 550, 50)]
    whole = backend.score([Sequence(ids=ids[:-1], slices=tuple(parts))])
    apart = [backend.score([Sequence(ids=ids[: part.last], slices=(part,))])[0] for part in parts]
    worst = max(
        float(np.abs(a.logprobs - b.logprobs).max()) for a, b in zip(whole, apart, strict=True)
    )
    print(f"one pass against per step: max |difference| {worst:.2e} nats")
    assert worst < ONE_PASS


def test_the_same_forward_twice_is_equal_to_the_bit(backend: ReferenceBackend) -> None:
    ids = tokens(90)
    sequence = Sequence(ids=ids[:-1], slices=(one(ids, 30),))
    (first,), (second,) = backend.score([sequence]), backend.score([sequence])
    assert (first.logprobs == second.logprobs).all()
    assert (first.entropy == second.entropy).all()


def test_routes_equal_the_librarys_own_router_logits(
    backend: ReferenceBackend, checkpoints: dict[CheckpointKind, Path], kind: CheckpointKind
) -> None:
    ids, P = tokens(120), 40
    (result,) = backend.score([Sequence(ids=ids[:-1], slices=(one(ids, P),))])
    if kind == "dense":
        assert result.routes is None
        assert not backend.trainer.routes_ordered
        return
    check_routes(result, checkpoints[kind], ids, P)
    assert backend.trainer.routes_ordered


def check_routes(result: SliceResult, model_dir: Path, ids: npt.NDArray[np.int32], P: int) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    with torch.no_grad():
        fed = torch.from_numpy(ids[:-1]).long()[None]
        layers = model(fed, output_router_logits=True).router_logits
    top = torch.stack([layer.double() for layer in layers], 1)[P - 1 :].topk(5, sorted=True)
    assert result.routes is not None
    assert result.margins is not None
    assert result.layer_ids == (0, 1, 2, 3)
    assert result.routes.dtype == np.uint8
    assert result.routes.shape == (len(ids) - P, 4, 4)
    assert (result.routes == top.indices[..., :4].numpy()).all()
    wanted = (top.values[..., 3] - top.values[..., 4]).numpy()
    np.testing.assert_allclose(result.margins, wanted, atol=1e-5)


def test_the_fingerprint_names_what_changes_numbers(
    backend: ReferenceBackend, checkpoints: dict[CheckpointKind, Path], kind: CheckpointKind
) -> None:
    trainer = backend.trainer
    assert (trainer.backend, trainer.model, trainer.dtype) == ("reference", kind, "float32")
    assert trainer.settings["torch"] == str(torch.__version__)
    assert trainer.settings.get("experts") == ("grouped_mm" if kind == "moe" else None)
    narrow = ReferenceBackend.load(
        TeacherConfig(store="unused", model=str(checkpoints[kind]))
    ).trainer
    assert narrow.dtype == "bfloat16"
    assert narrow.checkpoint == trainer.checkpoint
    assert narrow.digest != trainer.digest


TEXT = {
    **{"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256},
}


def test_the_text_of_a_model_that_sees_images_is_scored() -> None:
    eye = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "image_size": 28}
    described = Gemma3Config(
        text_config=TEXT, vision_config={**eye, "num_attention_heads": 2, "patch_size": 14}
    )
    model = AutoModelForCausalLM.from_config(described).eval()
    backend = ReferenceBackend(model, name="tiny")
    assert (backend.vocab_size, backend.max_tokens) == (300, 256)
    ids = np.random.default_rng(0).integers(5, 290, 40).astype(np.int32)
    part = Slice(trace_id="a", prompt_len=1, response_ids=ids[1:])
    (result,) = backend.score([Sequence(ids=ids[:-1], slices=(part,))])
    fed = torch.from_numpy(ids).long()
    with torch.no_grad():
        full = model(input_ids=fed[None, :-1]).logits[0].double().log_softmax(-1)
    wanted = full.gather(-1, fed[1:, None])[:, 0].numpy()
    np.testing.assert_allclose(result.logprobs, wanted, atol=1e-5)


def test_a_model_whose_part_before_the_head_is_not_known_is_refused_in_words() -> None:
    described = Llama4TextConfig(**TEXT, head_dim=16, intermediate_size_mlp=96, num_local_experts=4)
    model = AutoModelForCausalLM.from_config(described)
    with pytest.raises(TeacherError, match="Llama4ForCausalLM does not name its part before"):
        ReferenceBackend(model, name="tiny")


def test_cuda_that_is_not_there_is_said(
    checkpoints: dict[CheckpointKind, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = TeacherConfig(store="unused", model=str(checkpoints["dense"]), device="cuda")
    with pytest.raises(TeacherError, match="finds no CUDA device"):
        pick_device(config)
