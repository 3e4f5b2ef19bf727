"""The loading snippets of docs/exports.md run as they are printed, on exports of a real store."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import pytest
from typer.testing import CliRunner

from driftgate import cli
from driftgate.adapters.export_select import REASONS
from driftgate.commands.export import FormatOption
from driftgate.testing.stores import write_store
from driftgate.testing.traces import make_intent, make_trajectory
from driftgate.trace import Reward

DOC = (Path(__file__).parents[2] / "docs" / "exports.md").read_text()
FOREIGN = ("verl",)
"""Sections whose snippet imports a package that is not installed for tests: `make foreign`."""


def snippets(section: str) -> list[str]:
    (text,) = re.findall(rf"^### {section}\n(.*?)(?=^### |\Z)", DOC, re.M | re.S)
    return re.findall(r"```python\n(.*?)```", text, re.S)


def exported(folder: Path, name: str, dense: str = "") -> Path:
    """Two runs of two steps with a reward, exported in the format of that name. ``dense``: a run
    without routes."""
    store = folder / "store"
    traces = [t for run in ("a", "b") for t in make_trajectory(run, steps=2, routed=run != dense)]
    records = [record for trace in traces for record in (make_intent(trace), trace)]
    rewards = [Reward(trajectory=run, value=1.0, given_ns=1) for run in ("a", "b")]
    write_store(store, [*records, *rewards])
    out = folder / "out"
    arguments = ["export", "--format", name, "--store", str(store), "-o", str(out)]
    result = CliRunner().invoke(cli.app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return out


def run(section: str, out: Path, number: int = 0) -> dict[str, Any]:
    names: dict[str, Any] = {"out": out}
    exec(snippets(section)[number], names)
    return names


def test_every_section_is_run_here_or_with_the_foreign_packages() -> None:
    sections = set(re.findall(r"^### (.*)$", DOC, re.M))
    here = set(re.findall(r'run\(\s*"([^"]+)"', Path(__file__).read_text()))
    assert sections == here | set(FOREIGN)


def test_every_format_and_reason_is_explained() -> None:
    for name in get_args(FormatOption):
        assert f"`{name}`" in DOC or f"--format {name}" in DOC, name
    for code in REASONS.keys() - {"damaged"}:
        assert f"`{code}`" in DOC, code


@pytest.mark.parametrize("name", ["slime", "miles"])
def test_slime(tmp_path: Path, name: str) -> None:
    names = run("slime and miles", exported(tmp_path, name))
    assert names["rollout"]["rollout_id"] == 0
    assert [row["reward"] for row in names["samples"]] == [1.0, 1.0]


def test_prime_rl(tmp_path: Path) -> None:
    (one, two) = run("prime-rl", exported(tmp_path, "prime-rl"))["samples"]
    assert (sum(one.mask), one.routed_experts.shape) == (10, [34, 4, 4])
    assert two.trace_id == "b-1.0"


def test_nemo_rl(tmp_path: Path) -> None:
    logs = run("NeMo-RL", exported(tmp_path, "nemo-rl"))["logs"]
    assert [len(message["token_ids"]) for message in logs[0]] == [12, 5, 12, 5]


def test_skyrl(tmp_path: Path) -> None:
    output = run("SkyRL", exported(tmp_path, "skyrl"))["output"]
    assert output["rewards"] == [1.0, 1.0]
    assert [entry["instance_id"] for entry in output["trajectory_ids"]] == ["a", "b"]
    assert len(output["rollout_expert_indices"][0]) == 33


def test_trl(tmp_path: Path) -> None:
    names = run("TRL", exported(tmp_path, "trl"))
    rollouts = names["rollout_func"](["prompt"], None)
    assert {"prompt_ids", "completion_ids", "logprobs"} <= rollouts.keys()
    assert len(rollouts["prompt_ids"]) == 1
    assert rollouts["env_mask"] == [[1] * 5 + [0] * 12 + [1] * 5]
    assert names["recorded_reward"](**rollouts) == [1.0]


def test_hugging_face(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = run("Parquet and Hugging Face datasets", exported(tmp_path, "hf"))["rows"]
    assert rows.num_rows == 2
    assert rows.features["routes"].feature.dtype == "uint8"
    assert sum(rows[0]["mask"]) == 10
    assert rows[0]["reward"] == 1.0


@pytest.mark.parametrize("name", ["parquet", "hf"])
def test_parquet(tmp_path: Path, name: str) -> None:
    names = run("Parquet and Hugging Face datasets", exported(tmp_path, name), 1)
    assert names["routes"].shape == (33, 4, 4)
    assert names["row"]["request"].startswith('{"model":"tiny-moe"')


def test_parquet_of_a_dense_run(tmp_path: Path) -> None:
    names = run("Parquet and Hugging Face datasets", exported(tmp_path, "hf", dense="a"), 1)
    assert names["row"]["routes"] is None


def test_megatron_takes_the_runs_with_routes(tmp_path: Path) -> None:
    assert len(run("Megatron-Core", exported(tmp_path, "megatron", dense="a"))["samples"]) == 1


def test_megatron(tmp_path: Path) -> None:
    lists = run("Megatron-Core", exported(tmp_path, "megatron"))["replay"]
    assert [tuple(rows.shape) for rows in lists] == [(64, 4), (64, 4)]
