"""What driftgate must know about a Hugging Face model: its routers, its traps, its files.

Router choices are read by forward hooks on the router modules, because ``output_router_logits``
computes an auxiliary loss over every layer, omits dense layers, and ``topk(router_logits)`` is not
how DeepSeek, GLM or MiniMax choose. Hooks also work after FSDP's ``fully_shard``, where the
library's own recorder silently returns nothing. Nothing here imports torch: modules and tensors
come in.

Shape letters: ``S`` positions fed, ``N`` positions kept, ``E`` experts, ``K`` experts per token,
``L`` MoE layers in the order of their absolute numbers.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from driftgate.errors import TeacherError
from driftgate.trace import Reason, Routes

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["Routed", "RouterTap", "checkpoint_digest", "inspect_model", "text_config"]

F32 = npt.NDArray[np.float32]

ROUTER_CLASS = re.compile(r"Top[Kk]Router$")
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""Keys of a config that say how many experts a layer has; above 1, each is chosen by a router."""
LAYER_NAME = re.compile(r"\.layers\.(\d+)(?:\.|$)")
INV_FREQ = re.compile(r"(?:(\w+)_)?(?<!original_)inv_freq")
"""Rotary buffers that a forward uses, with the type of layer where types differ; the originals are
kept for lengths beyond the pretraining's."""
ROTARY_TOLERANCE = 1e-6
"""Relative; a device may round a power differently, a cast to 16 bits errs by 1e-4 or more."""
UINT8_EXPERTS = 256
"""Up to this many experts an id fits one byte; engines choose the same."""


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


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Routed:
    """The experts that a forward chose at the positions that were asked for."""

    routes: Routes
    """[N, L, K] expert ids in the order in which the router returned them."""
    margins: F32 | None
    """[N, L] router logit of the last chosen expert minus that of the first not chosen, at least 0;
    None where the router does not choose the highest of its softmax."""
    layer_ids: tuple[int, ...]
    """[L] absolute layer numbers, ascending."""
    experts: int
    """E of the router with the most: no layer has ids from here on."""
    ordered: bool
    """Every row here is in descending order of the router's softmax."""


class RouterTap:
    """Reads the router choices of a model's forwards of one sequence each (batch of 1).

    ``model`` may be sharded; a model without routers gives ``None`` from every ``capture``.
    """

    def __init__(self, model: nn.Module) -> None:
        found = [
            (_layer(name), module)
            for name, module in model.named_modules()
            if ROUTER_CLASS.search(type(module).__name__)
        ]
        self._routers = sorted(found, key=lambda item: item[0])
        self.layer_ids = tuple(layer for layer, _ in self._routers)
        if len(set(self.layer_ids)) != len(self.layer_ids):
            raise TeacherError(f"two routers claim one layer: {self.layer_ids}")
        self.modules = [module for _, module in self._routers]
        """By layer, as ``layer_ids``."""
        self.without = None if found else _without_routers(getattr(model, "config", None))
        """Why there is nothing to read; None where there is."""
        self.experts: list[int] = []
        """[L] experts of each router; known once a forward was captured."""

    @contextmanager
    def capture(self, rows: Tensor) -> Iterator[_Capture]:
        """Hook every router for one forward and keep the choices at ``rows`` (int64 positions)."""
        capture = _Capture(rows, self.layer_ids)
        handles = [
            module.register_forward_hook(capture.hook(slot))
            for slot, (_, module) in enumerate(self._routers)
        ]
        try:
            yield capture
            self.experts = capture.experts
        finally:
            for handle in handles:
                handle.remove()


def _without_routers(config: Any) -> str:
    """What a model in which no router was found is to be called."""
    if config is not None and _has_experts(config.to_dict()):
        return f"the routers of {config.model_type} are not known to driftgate"
    return "the trainer's model has no routers"


def _has_experts(config: Mapping[str, Any]) -> bool:
    nested = (value for value in config.values() if isinstance(value, Mapping))
    counts = (config.get(key) for key in EXPERT_COUNTS)
    return any(isinstance(n, int) and n > 1 for n in counts) or any(map(_has_experts, nested))


class _Capture:
    """The choices of one forward; ``result`` once it has run."""

    def __init__(self, rows: Tensor, layer_ids: tuple[int, ...]) -> None:
        self._rows = rows
        self._layer_ids = layer_ids
        self._chosen: dict[int, Tensor] = {}
        self._margins: dict[int, Tensor] = {}
        self._ordered = True
        self._by_softmax = True
        self._experts: dict[int, int] = {}

    def hook(self, slot: int) -> Any:
        def record(_module: object, _args: object, output: object) -> None:
            logits_SE, indices_SK = _router_output(output)
            assert slot not in self._chosen, "a router ran twice in one forward"
            self._experts[slot] = logits_SE.shape[-1]
            self._keep(slot, logits_SE[self._rows], indices_SK[self._rows])

        return record

    def _keep(self, slot: int, logits_NE: Tensor, indices_NK: Tensor) -> None:
        probs_NE = logits_NE.float().softmax(-1)
        chosen_NK = probs_NE.gather(-1, indices_NK)
        others_NE = probs_NE.scatter(-1, indices_NK, -1.0)
        self._chosen[slot] = indices_NK
        self._by_softmax &= bool((chosen_NK.amin(-1) >= others_NE.amax(-1)).all())
        self._ordered &= bool((chosen_NK[:, :-1] >= chosen_NK[:, 1:]).all())
        # The gap of the logits is that of the log-probabilities, whatever the number of experts.
        gap_N = logits_NE.gather(-1, indices_NK).float().amin(-1) - (
            logits_NE.scatter(-1, indices_NK, float("-inf")).float().amax(-1)
        )
        self._margins[slot] = gap_N.clamp_min_(
            0.0
        )  # below 0 only where the softmax rounds to a tie

    @property
    def experts(self) -> list[int]:
        """Experts of each router that ran, by layer."""
        return [self._experts[slot] for slot in sorted(self._experts)]

    def result(self) -> Routed | None:
        """The choices, or None for a model without routers. Raises ``TeacherError`` if one was
        missed."""
        if not self._layer_ids:
            return None
        missed = [layer for slot, layer in enumerate(self._layer_ids) if slot not in self._chosen]
        if missed:
            raise TeacherError(
                f"no router choices came from layers {missed}: fused or skipped routers?"
            )
        slots = range(len(self._layer_ids))
        dtype = np.uint8 if max(self.experts) <= UINT8_EXPERTS else np.uint16
        routes = np.stack([self._chosen[slot].cpu().numpy() for slot in slots], axis=1)
        margins = np.stack([self._margins[slot].cpu().numpy() for slot in slots], axis=1)
        return Routed(
            routes=cast(Routes, routes.astype(dtype)),
            margins=margins if self._by_softmax else None,
            layer_ids=self._layer_ids,
            experts=max(self.experts),
            ordered=self._ordered,
        )


def _layer(name: str) -> int:
    match = LAYER_NAME.search(f".{name}")
    if match is None:
        raise TeacherError(f"router {name!r} does not say its layer (expected …layers.<n>.…)")
    return int(match.group(1))


def _router_output(output: object) -> tuple[Tensor, Tensor]:
    """``(logits [S, E], indices [S, K])`` of transformers >= 5.19; older layouts differ and are
    refused."""
    if not isinstance(output, tuple) or len(output) != 3:
        raise TeacherError(
            "the router does not return (logits, weights, indices): transformers >= 5.19?"
        )
    logits, weights, indices = output
    shapes = (tuple(logits.shape), tuple(weights.shape), tuple(indices.shape))
    if len(shapes[0]) != 2 or shapes[1] != shapes[2] or shapes[0][0] != shapes[2][0]:
        raise TeacherError(f"router output has shapes {shapes}, expected [S, E], [S, K], [S, K]")
    if indices.is_floating_point() or shapes[2][1] >= shapes[0][1]:
        raise TeacherError(f"router indices have dtype {indices.dtype} and K={shapes[2][1]}")
    return logits, indices


def text_config(model: Any) -> Any:
    """What a causal language model's ``config`` says of its text, which is all but in a model of
    several parts. Raises ``TeacherError`` if it names no size of a vocabulary."""
    found = model.config.get_text_config()
    if not hasattr(found, "vocab_size"):
        raise TeacherError(f"{type(model).__name__} does not say how many token ids it takes")
    return found


def inspect_model(model: nn.Module) -> list[Reason]:
    """Findings that change the model's numbers, empty for a model that is as its checkpoint means
    it.

    Finds rotary frequencies that went through a narrower type: ``model.to(bfloat16)`` also casts
    the ``inv_freq`` buffers, which ``from_pretrained(dtype=bfloat16)`` leaves in float32.
    """
    findings = []
    for name, module, layer_type, inv_freq in _rotary_buffers(model):
        seen = _rotary_fault(module, layer_type, inv_freq)
        if seen is not None:
            findings.append(
                Reason(
                    code="rotary_inv_freq_cast",
                    detail=f"{name} {seen}",
                    fix="load with from_pretrained(dtype=…), never cast a model with .to(dtype)",
                )
            )
    return findings


def _rotary_buffers(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """Name, module, type of layer ('' where all share one) and frequencies of each that is used."""
    for name, module in model.named_modules():
        for buffer, inv_freq in module.named_buffers(recurse=False):
            found = INV_FREQ.fullmatch(buffer)
            if found and hasattr(module, "config"):
                yield f"{name}.{buffer}", module, found[1] or "", inv_freq


def _rotary_fault(module: nn.Module, layer_type: str, inv_freq: Tensor) -> str | None:
    """What is wrong with a rotary buffer, or None. Types that depend on the length are not
    recomputed."""
    kind = str(inv_freq.dtype).removeprefix("torch.")
    if kind != "float32":
        return f"is {kind}, not float32"
    rope_type: Any = getattr(module, "rope_type", None)
    if layer_type and isinstance(rope_type, dict):
        rope_type = rope_type.get(layer_type)
    if rope_type != "default":
        return None
    config: Any = module.config
    typed = layer_type in (getattr(config, "layer_types", None) or ())
    if typed and hasattr(config, "per_layer_config"):
        config = config.per_layer_config[layer_type]  # heads of other sizes, as in Gemma 4
    of_layers = {"layer_type": layer_type} if layer_type else {}
    wanted, _ = module.compute_default_rope_parameters(config, **of_layers)  # type: ignore[operator]
    error = ((inv_freq.cpu() - wanted.cpu()).abs() / wanted.cpu()).max().item()
    return (
        None
        if error <= ROTARY_TOLERANCE
        else f"differs from its float32 value by {error:.1e} (relative)"
    )


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
