"""The checkpoints that everything else here stands on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from driftgate.testing.checkpoints import CheckpointKind, make_checkpoint

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What now?"}]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]


def test_a_checkpoint_is_made_once(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "a", "dense", dtype="float32")
    weights = path / "model.safetensors"
    before = weights.stat().st_mtime_ns
    assert make_checkpoint(tmp_path / "a", "dense", dtype="float32") == path
    assert weights.stat().st_mtime_ns == before
    make_checkpoint(tmp_path / "a", "dense", seed=1, dtype="float32")
    assert weights.stat().st_mtime_ns != before


def test_a_foreign_directory_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty"):
        make_checkpoint(tmp_path, "moe")


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_answers_vary_and_survive_a_history(
    checkpoints: dict[CheckpointKind, Path], kind: CheckpointKind
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoints[kind])
    model = AutoModelForCausalLM.from_pretrained(checkpoints[kind])
    prompt = render(tokenizer, MESSAGES)
    texts, kept = [], 0
    for seed in range(8):
        torch.manual_seed(seed)
        out = model.generate(torch.tensor([prompt]), do_sample=True, top_k=0, max_new_tokens=24)
        answer = out[0, len(prompt) :].tolist()
        texts.append(tokenizer.decode(answer, skip_special_tokens=True))
        history = [{"role": "assistant", "content": texts[-1]}, {"role": "user", "content": "And?"}]
        following = render(tokenizer, [*MESSAGES, *history])
        kept += following[: len(prompt) + len(answer)] == prompt + answer
    assert len(set(texts)) >= 7
    assert kept >= 7, "one token in ten thousand is no word"


def test_tool_calls_and_their_results_are_rendered(
    checkpoints: dict[CheckpointKind, Path],
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoints["dense"])
    call = {"function": {"name": "add", "arguments": {"a": 1}}}
    turns: list[dict[str, Any]] = [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2"},
    ]
    text = tokenizer.decode(render(tokenizer, [*MESSAGES, *turns]))
    assert '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>' in text
    assert "<|im_start|>user\n<tool_response>\n2\n</tool_response><|im_end|>" in text
    assert text.endswith("<|im_start|>assistant\n")


def render(tokenizer: Any, messages: list[dict[str, Any]]) -> list[int]:
    ids: list[int] = tokenizer.apply_chat_template(
        messages, tools=TOOLS, add_generation_prompt=True, return_dict=False
    )
    return ids
