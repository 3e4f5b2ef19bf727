"""A checkpoint's digest: equal for the same function, however it was saved; else different."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from driftgate.adapters.hf_digest import checkpoint_digest
from driftgate.errors import TeacherError
from driftgate.testing.checkpoints import CheckpointKind, make_checkpoint


@pytest.fixture
def dense(checkpoints: dict[CheckpointKind, Path]) -> Path:
    return checkpoints["dense"]


@pytest.fixture
def copy(dense: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(dense, tmp_path / "copy"))


def edit(model_dir: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = model_dir / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def test_it_follows_the_weights(dense: Path, tmp_path: Path) -> None:
    other = make_checkpoint(tmp_path / "other", "dense", seed=1)
    again = make_checkpoint(tmp_path / "again", "dense")
    assert checkpoint_digest(dense) == checkpoint_digest(again)
    assert checkpoint_digest(dense) != checkpoint_digest(other)


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_shards_do_not_matter(
    checkpoints: dict[CheckpointKind, Path], kind: CheckpointKind, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoints[kind], dtype=torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="500KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert checkpoint_digest(tmp_path) == checkpoint_digest(checkpoints[kind])


def older_spelling(config: dict[str, Any]) -> None:
    """The same model as transformers 4 writes it."""
    config["transformers_version"] = "4.51.0"
    config["torch_dtype"] = config.pop("dtype")
    config["rope_theta"] = int(config.pop("rope_parameters")["rope_theta"])
    config["rope_scaling"] = None
    config["_name_or_path"] = "/somewhere/else"
    config["sliding_window"] = 4096
    del config["layer_types"]


def yarn_4(config: dict[str, Any]) -> None:
    older_spelling(config)
    config["rope_scaling"] = {"type": "yarn", "factor": 4}


def yarn_5(config: dict[str, Any]) -> None:
    config["rope_parameters"] = {
        "rope_type": "yarn",
        "factor": 4.0,
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 8192,
    }


def test_versions_of_the_library_do_not_matter(dense: Path, copy: Path) -> None:
    edit(copy, older_spelling)
    assert checkpoint_digest(copy) == checkpoint_digest(dense)


def test_spellings_of_rope_scaling_do_not_matter(dense: Path, copy: Path, tmp_path: Path) -> None:
    newer = Path(shutil.copytree(dense, tmp_path / "newer"))
    edit(copy, yarn_4)
    edit(newer, yarn_5)
    assert checkpoint_digest(copy) == checkpoint_digest(newer)
    assert checkpoint_digest(copy) != checkpoint_digest(dense)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rms_norm_eps", 1e-5),
        ("num_attention_heads", 8),
        ("hidden_act", "gelu"),
        # Of Hunyuan, Ernie, OLMoE, gpt-oss, Llama 4, and of whoever comes next.
        ("moe_topk", 2),
        ("moe_k", 2),
        ("clip_qkv", 0.5),
        ("swiglu_limit", 0.5),
        ("no_rope_layers", [1, 0, 1, 0]),
        ("a_key_of_tomorrow", "x"),
        ("rope_parameters", {"rope_theta": 1e6, "rope_type": "default"}),
    ],
)
def test_settings_that_change_numbers_matter(
    dense: Path, copy: Path, key: str, value: object
) -> None:
    edit(copy, lambda config: config.update({key: value}))
    assert checkpoint_digest(copy) != checkpoint_digest(dense)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("architectures", ["Another"]),
        ("use_cache", False),
        ("attention_dropout", 0.1),
        ("image_token_id", 9),
        ("router_aux_loss_coef", 0.01),
        ("clip_qkv", None),
    ],
)
def test_settings_that_change_no_number_do_not_matter(
    dense: Path, copy: Path, key: str, value: object
) -> None:
    edit(copy, lambda config: config.update({key: value}))
    assert checkpoint_digest(copy) == checkpoint_digest(dense)


def test_the_config_of_a_part_counts_as_the_whole_does(copy: Path) -> None:
    digests = []
    for part in ({"norm_eps": 1e-6}, {"norm_eps": 1e-6, "dtype": "float32"}, {"norm_eps": 1e-5}):
        edit(copy, lambda config, part=part: config.update({"vision_config": part}))  # type: ignore[misc]
        digests.append(checkpoint_digest(copy))
    assert digests[0] == digests[1] != digests[2]


AS_PUBLISHED: dict[str, dict[str, Any]] = {
    "deepseek_v3": {
        **{"n_routed_experts": 256, "ep_size": 1, "moe_layer_freq": 1, "aux_loss_alpha": 0.001},
        **{"scoring_func": "sigmoid", "topk_method": "noaux_tc", "rope_theta": 10000},
        "rope_scaling": {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096},
    },
    "gpt_oss": {
        **{"swiglu_limit": 7.0, "sliding_window": 128, "rope_theta": 150000},
        "rope_scaling": {
            **{"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0},
            **{"truncate": False, "original_max_position_embeddings": 4096},
        },
    },
    "gemma2": {"sliding_window": 4096, "final_logit_softcapping": 30.0, "rope_theta": 10000.0},
    "qwen2": {"sliding_window": 32768, "use_sliding_window": False, "max_window_layers": 21},
    "qwen3_next": {"full_attention_interval": 4, "num_experts": 512, "partial_rotary_factor": 0.25},
}
NEWER = {
    *("rope_parameters", "rope_interleave", "swiglu_alpha", "layer_types", "mlp_layer_types"),
    *("dtype", "qk_head_dim"),
}
"""What transformers 4 did not write, and what it wrote instead."""


@pytest.mark.parametrize("family", AS_PUBLISHED)
def test_a_published_config_saved_anew_is_the_same(family: str, tmp_path: Path) -> None:
    written = AutoConfig.for_model(family).to_dict().items()
    older = {key: value for key, value in written if key not in NEWER} | AS_PUBLISHED[family]
    (tmp_path / "config.json").write_text(json.dumps(older))
    save_numpy({"any": np.zeros(1)}, tmp_path / "model.safetensors")
    published = checkpoint_digest(tmp_path)
    AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path)
    assert checkpoint_digest(tmp_path) == published


def test_each_experts_choice_matters(
    checkpoints: dict[CheckpointKind, Path], tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(checkpoints["moe"], tmp_path / "copy"))
    edit(copy, lambda config: config.update({"num_experts_per_tok": 2}))
    assert checkpoint_digest(copy) != checkpoint_digest(checkpoints["moe"])


def test_one_bit_a_name_and_a_dtype_matter(dense: Path, copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    digests = {checkpoint_digest(dense)}
    name = "model.norm.weight"
    bit = weights[name].clone().view(torch.int16)
    bit[0] ^= 1
    for changed in (
        {name: bit.view(torch.bfloat16)},
        {name: weights[name].float()},
        {name: weights[name].view(torch.int16)},
        {name: weights[name], "another": weights[name].clone()},
    ):
        save_file({**weights, **changed}, copy / "model.safetensors")
        digests.add(checkpoint_digest(copy))
    assert len(digests) == 5


def test_a_second_copy_of_tied_weights_does_not_matter(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    tied = {**weights, "lm_head.weight": weights["model.embed_tokens.weight"].clone()}
    save_file(tied, copy / "model.safetensors")
    twice = checkpoint_digest(copy)
    del tied["lm_head.weight"]
    save_file(tied, copy / "model.safetensors")
    assert checkpoint_digest(copy) == twice


def test_a_large_checkpoint_streams_without_torch(tmp_path: Path, dense: Path) -> None:
    shutil.copy(dense / "config.json", tmp_path)
    save_numpy({"big": np.zeros(16 << 20, np.uint8)}, tmp_path / "model.safetensors")
    tracemalloc.start()
    digest = checkpoint_digest(tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 << 20
    code = (
        "import sys; from driftgate.adapters.hf_digest import checkpoint_digest as of; "
        "print(of(sys.argv[1]), 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [digest, "False"]


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_torn_file_has_no_digest(copy: Path, keep: int) -> None:
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(TeacherError, match="holds no checkpoint"):
        checkpoint_digest(copy)


def test_a_directory_without_weights_has_no_digest(copy: Path, tmp_path: Path) -> None:
    for folder in (tmp_path, copy):
        (copy / "model.safetensors").unlink(missing_ok=True)
        with pytest.raises(TeacherError, match="holds no checkpoint"):
            checkpoint_digest(folder)
