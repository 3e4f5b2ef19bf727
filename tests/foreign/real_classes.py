"""Exports loaded by the projects that they are for, where those install on CPU: `make foreign`.

verl, SkyRL, TRL and Megatron-Core are the packages of PyPI at the versions in ``requirements.txt``,
installed without their dependencies into a folder of their own. Not part of `make test`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from driftgate import cli
from driftgate.adapters import formats
from driftgate.adapters.export_base import read_export
from driftgate.adapters.megatron_routes import Rank, replay_data
from driftgate.samples import Sample
from driftgate.testing.stores import write_store
from driftgate.testing.traces import make_intent, make_trace, make_trajectory
from driftgate.trace import Reward

DOC = (Path(__file__).parents[2] / "docs" / "exports.md").read_text()


def snippet(section: str, out: Path) -> dict[str, Any]:
    (text,) = re.findall(rf"^### {section}\n(.*?)(?=^### |\Z)", DOC, re.M | re.S)
    names: dict[str, Any] = {"out": out}
    exec(re.findall(r"```python\n(.*?)```", text, re.S)[0], names)
    return names


@pytest.fixture
def export(tmp_path: Path) -> Callable[[str], tuple[Path, list[Sample]]]:
    """Runs of one to three steps, lengths all different, and a branch; exported by name."""
    traces = [t for n, run in enumerate("abc", 1) for t in make_trajectory(run, steps=n, prompt=5)]
    traces.append(make_trace(trajectory="c", step=9, base=traces[-3], prompt=3, response=7))
    records = [record for trace in traces for record in (make_intent(trace), trace)]
    rewards = [Reward(trajectory=run, value=0.25, given_ns=1) for run in "abc"]
    write_store(tmp_path / "store", [*records, *rewards])

    def run(name: str) -> tuple[Path, list[Sample]]:
        out = tmp_path / name
        arguments = ["export", "-f", name, "--store", str(tmp_path / "store"), "-o", str(out)]
        result = CliRunner().invoke(cli.app, arguments, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return out, read_export(out, formats.load(name))

    return run


def test_verl(export: Callable[[str], tuple[Path, list[Sample]]]) -> None:
    """A row without its padding is what verl's own agent loop makes of the same sample."""
    from verl.experimental.agent_loop.agent_loop import AgentLoopMetrics, AgentLoopOutput

    out, samples = export("verl")
    batch = snippet("verl", out)["batch"]
    assert len(batch) == len(samples) == 4
    for row, sample in zip(batch, samples, strict=True):
        start = sample.meta.prompt_len
        theirs = AgentLoopOutput(
            prompt_ids=sample.tokens[:start].tolist(),
            response_ids=sample.tokens[start:].tolist(),
            response_mask=sample.mask[start:].astype(int).tolist(),
            response_logprobs=sample.logprobs[start:].tolist(),
            routed_experts=sample.routes,
            reward_score=sample.meta.reward,
            metrics=AgentLoopMetrics(),
        ).as_dict()
        ours, width = row.batch, row.batch["prompts"].shape[0]
        whole = slice(width - start, width - start + sample.meta.tokens)
        real = slice(0, sample.response_len)
        assert ours["prompts"][width - start :].equal(theirs["prompts"])
        assert ours["routed_experts"][whole].equal(theirs["routed_experts"])
        for name in ("responses", "response_mask", "rollout_log_probs", "rm_scores"):
            assert ours[name][real].equal(theirs[name]), name
            assert not ours[name][sample.response_len :].any(), name
        assert ours["attention_mask"].sum() == sample.meta.tokens


def test_skyrl(export: Callable[[str], tuple[Path, list[Sample]]]) -> None:
    """SkyRL's own preprocessing takes the output and pads it as it pads its own."""
    from skyrl.train.dataset.preprocess import convert_prompts_responses_to_batch_tensors

    out, samples = export("skyrl")
    output = snippet("SkyRL", out)["output"]
    assert [t["repetition_id"] for t in output["trajectory_ids"]] == [0, 0, 0, 1]
    rewards = [
        [0.0] * (len(ids) - 1) + [r]
        for ids, r in zip(output["response_ids"], output["rewards"], strict=True)
    ]

    class Tokenizer:
        pad_token_id = 0

    tokens, attention, _, _, masks, logprobs, experts = convert_prompts_responses_to_batch_tensors(
        Tokenizer(),
        output["prompt_token_ids"],
        output["response_ids"],
        rewards,
        output["loss_masks"],
        output["rollout_logprobs"],
        output["rollout_expert_indices"],
    )
    for row, sample in enumerate(samples):
        n, assert_equal = sample.meta.tokens, np.testing.assert_array_equal
        assert_equal(tokens[row, -n:].numpy(), sample.tokens)
        assert attention[row].sum() == n
        last = sample.response_len
        assert_equal(masks[row, -last:].numpy(), sample.mask[-last:])
        assert_equal(logprobs[row, -last:].numpy(), sample.logprobs[-last:])
        assert_equal(experts[row, -n:-1].numpy(), sample.routes)


def test_megatron(export: Callable[[str], tuple[Path, list[Sample]]]) -> None:
    """Megatron's routers replay exactly the exported experts, with the scores of those."""
    import torch
    from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction

    _, samples = export("megatron")
    rank = Rank(tp=2, tp_rank=1, sequence_parallel=True, pp=2, pp_rank=1)
    lists = replay_data(samples, seq_len=64, num_layers=4, moe_layers=range(4), rank=rank)
    RouterReplay.clear_global_router_replay_instances()
    routers = [RouterReplay() for _ in lists]
    RouterReplay.set_replay_data([torch.from_numpy(rows) for rows in lists])
    RouterReplay.set_global_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
    for router, layer in zip(routers, (2, 3), strict=True):
        scores = torch.rand(32 * len(samples), 16)
        probs, chosen = router.get_replay_topk(scores, 4)
        for row in range(len(chosen)):
            position, sample = 32 + row // len(samples), samples[row % len(samples)]
            if position < sample.meta.tokens - 1:
                assert sample.routes is not None
                expected = sample.routes[position, layer].tolist()
                assert chosen[row].tolist() == expected
                assert probs[row].tolist() == scores[row, expected].tolist()
            assert len(set(chosen[row].tolist())) == 4
    RouterReplay.clear_global_router_replay_instances()


def test_trl(export: Callable[[str], tuple[Path, list[Sample]]], tmp_path: Path) -> None:
    """TRL's trainer takes a step on the recorded samples."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from driftgate.testing.checkpoints import make_checkpoint

    out, samples = export("trl")
    names = snippet("TRL", out)
    checkpoint = make_checkpoint(tmp_path / "model", "dense", dtype="float32")
    seen: list[Any] = []

    def reward(completion_ids: list[list[int]], **fields: Any) -> list[float]:
        seen.extend(completion_ids)
        return list(names["recorded_reward"](**fields))

    trainer = GRPOTrainer(
        model=str(checkpoint),
        reward_funcs=reward,
        rollout_func=names["rollout_func"],
        train_dataset=Dataset.from_list([{"prompt": "x"}] * 4),
        args=GRPOConfig(
            output_dir=str(tmp_path / "run"),
            max_steps=1,
            use_cpu=True,
            bf16=False,
            per_device_train_batch_size=4,
            num_generations=4,
            report_to="none",
        ),
    )
    trainer.train()
    assert seen == [s.tokens[s.meta.prompt_len :].tolist() for s in samples]


def test_the_versions_are_those_that_the_docs_name() -> None:
    wanted = (Path(__file__).parent / "requirements.txt").read_text()
    for name, version in re.findall(r"^(verl|skyrl|trl|megatron-core)==(.*)$", wanted, re.M):
        text = (Path(__file__).parents[2] / "adapters" / _module(name)).read_text()
        assert f"{name} {version}" in " ".join(text.split()), name


def _module(name: str) -> str:
    return {"megatron-core": "megatron_routes.py"}.get(name, f"{name}.py")
