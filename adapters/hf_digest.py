"""Whether two checkpoints are the same function: a digest of tensors and of what the config says.

Pure reads of files, without torch: the gateway takes the digest of what its engine serves.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from driftgate.errors import TeacherError

__all__ = ["checkpoint_digest"]

BLOCK = 1 << 20
"""Bytes of a tensor read at once."""
MAX_HEADER = 100_000_000
"""Bytes; the safetensors library refuses longer headers as well."""

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
"""Tied weights are saved once or twice, as a version likes."""
DEFAULT_THETA = 10_000.0
"""transformers' base of rotary frequencies where a config names none."""
PRETRAINED_LENGTH = ("llama3", "yarn", "longrope")
"""Rotary types whose frequencies follow the length of the pretraining, which transformers 5 writes
into their parameters."""
ROPE_KEYS = (
    *("rope_parameters", "rope_scaling", "rope_theta", "rope_local_base_freq"),
    *("partial_rotary_factor", "original_max_position_embeddings"),
)
OTHER_KEYS = frozenset(
    (
        # How it is found, held, run and trained.
        *("architectures", "auto_map", "transformers_version", "dtype", "torch_dtype"),
        *("use_cache", "cache_implementation", "attn_implementation", "experts_implementation"),
        *("pretraining_tp", "ep_size", "output_router_logits", "output_attentions", "torchscript"),
        *("output_hidden_states", "return_dict", "use_return_dict", "chunk_size_feed_forward"),
        *("id2label", "label2id", "problem_type", "is_encoder_decoder", "is_decoder"),
        *("seq_aux", "router_jitter_noise", "aux_loss_alpha", "num_nextn_predict_layers"),
        *("initializer_range", "max_position_embeddings", "tie_word_embeddings", "text_config"),
        # What tensors' names and shapes imply, and versions spell differently.
        *("num_experts", "num_local_experts", "n_routed_experts", "head_dim", "qk_head_dim"),
        *("first_k_dense_replace", "moe_layer_freq", "mlp_only_layers", "decoder_sparse_step"),
        *("mlp_layer_types", "layer_types", "full_attention_interval", "sliding_window_pattern"),
    )
)
"""Keys of ``config.json`` that say nothing of the function that is not in the tensors. Any other
may change numbers while every tensor stays the same, as ``moe_topk`` and ``clip_qkv`` do."""
OTHER_KEY = re.compile(r"^_|_token_(?:id|index)$|dropout$|_pdrop$|_loss_coef$")
SPELT_OUT = {"rope_interleave": True, "swiglu_alpha": 1.702}
"""What transformers 5 writes where 4 left it to the code."""


def checkpoint_digest(model_dir: Path | str) -> str:
    """16 hex digits that two checkpoints share only where they are the same function.

    Over the name, dtype, shape and bytes of every tensor, in order of names, and over what of
    ``config.json`` may change numbers and cannot be read off the tensors (``_numerics``). So
    neither the library that saved it, nor how it split the files, nor a repeated copy of tied
    weights changes it. Reads each byte once and holds 1 MiB of them; needs no torch.

    Raises ``TeacherError`` where the directory holds no whole safetensors checkpoint.
    """
    root = Path(model_dir)
    try:
        config = json.loads((root / "config.json").read_bytes())
        tensors = {name: one for path in _shards(root) for name, one in _tensors(path)}
        if not tensors:
            raise ValueError("there is no tensor in it")
        numerics = json.dumps(_numerics(config), sort_keys=True)
        digests = {name: _tensor_digest(tensors[name]) for name in sorted(tensors)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise TeacherError(
            f"{root} holds no checkpoint (config.json and *.safetensors are needed): {error}"
        ) from error
    if digests.get(HEAD) == digests.get(EMBEDDING):
        digests.pop(HEAD, None)
    total = hashlib.sha256(numerics.encode())
    for name, digest in digests.items():
        total.update(f"\0{name}\0{digest}".encode())
    return total.hexdigest()[:16]


class _Tensor(NamedTuple):
    """Where the bytes of a tensor stand."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def _shards(root: Path) -> list[Path]:
    """The files that transformers would load; others in the folder are other formats' copies."""
    index = root / "model.safetensors.index.json"
    if (root / "model.safetensors").is_file():
        return [root / "model.safetensors"]
    if index.is_file():
        return [
            root / name
            for name in sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        ]
    return sorted(root.glob("*.safetensors"))


def _tensors(path: Path) -> Iterator[tuple[str, _Tensor]]:
    """The header of a safetensors file: 8 bytes of length, then JSON."""
    size = path.stat().st_size
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > min(MAX_HEADER, size):
            raise ValueError(f"{path.name} is no safetensors file")
        header = json.loads(file.read(length))
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = (8 + length + offset for offset in entry["data_offsets"])
            if not start <= end <= size:
                raise ValueError(f"{path.name} ends before its tensor {name}")
            yield name, _Tensor(path, entry["dtype"], tuple(entry["shape"]), start, end)


def _tensor_digest(tensor: _Tensor) -> str:
    total = hashlib.sha256(f"{tensor.dtype}{tensor.shape}".encode())
    with tensor.path.open("rb", buffering=0) as file:
        file.seek(tensor.start)
        left = tensor.end - tensor.start
        while left and (block := file.read(min(left, BLOCK))):
            total.update(block)
            left -= len(block)
    if left:
        raise ValueError(f"{tensor.path.name} became shorter while it was read")
    return total.hexdigest()


def _numerics(config: dict[str, Any]) -> dict[str, Any]:
    """What ``config.json`` says that may change numbers, in one spelling for all versions: all but
    ``OTHER_KEYS``, those of the parts of a model of several (``vision_config``) among it.

    An absent key is a null, false or empty one. A key that is not known here makes a difference,
    also where it changes nothing: numbers that agree speak against such a difference.
    """
    text = {**config, **(config.get("text_config") or {}), "model_type": config.get("model_type")}
    said = {
        key: _numerics(value) if key.endswith("_config") and isinstance(value, dict) else value
        for key, value in text.items()
        if key not in OTHER_KEYS and key not in ROPE_KEYS and not OTHER_KEY.search(key)
    }
    said["num_key_value_heads"] = text.get("num_key_value_heads") or text.get("num_attention_heads")
    if not text.get("sliding_window") or text.get("use_sliding_window") is False:
        said["sliding_window"] = said["max_window_layers"] = None
    said["rope"] = _rope(text)
    return {
        key: _plain(value)
        for key, value in said.items()
        if value not in (None, [], {}) and value is not False and SPELT_OUT.get(key) != value
    }


def _rope(text: dict[str, Any]) -> list[str]:
    """Each kind of rotary embedding: transformers 4 spells it ``rope_theta`` and ``rope_scaling``,
    5 ``rope_parameters``, by type of layer where they differ."""
    given = text.get("rope_parameters") or text.get("rope_scaling") or {}
    found = [part for part in given.values() if isinstance(part, dict)] or [given]
    if "rope_local_base_freq" in text:
        found.append({"rope_theta": text["rope_local_base_freq"]})
    kinds = set()
    for part in found:
        kind = {key: value for key, value in part.items() if value is not None and key != "type"}
        named = kind.get("rope_type") or part.get("type") or "default"
        kind["rope_type"] = "default" if named == "mrope" else named
        kind.setdefault("rope_theta", text.get("rope_theta") or DEFAULT_THETA)
        kind.setdefault("partial_rotary_factor", text.get("partial_rotary_factor") or 1.0)
        if kind["rope_type"] in PRETRAINED_LENGTH:
            length = text.get("original_max_position_embeddings")
            known = length or text.get("max_position_embeddings")
            kind.setdefault("original_max_position_embeddings", known)
        kinds.add(json.dumps(_plain(kind), sort_keys=True))
    return sorted(kinds)


def _plain(value: Any) -> Any:
    """``value`` with every number a float: versions write 10000 and 10000.0."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value
