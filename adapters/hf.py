"""What driftgate must know about a Hugging Face model: its routers and its traps.

Router choices are read by forward hooks on the router modules, because ``output_router_logits``
computes an auxiliary loss over every layer, omits dense layers, and ``topk(router_logits)`` is not
how DeepSeek, GLM or MiniMax choose. Hooks also work after FSDP's ``fully_shard``, where the
library's own recorder silently returns nothing. Nothing here imports torch: modules and tensors
come in.

Shape letters: ``S`` positions fed, ``N`` positions kept, ``E`` experts, ``K`` experts per token,
``L`` MoE layers in the order of their absolute numbers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

from driftgate.errors import TeacherError
from driftgate.trace import Reason, Routes

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["Routed", "RouterTap", "inspect_model", "model_limit", "text_config"]

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


def model_limit(model: Any) -> int:
    """Positions that the model was made for."""
    return int(getattr(text_config(model), "max_position_embeddings", 1 << 20))


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
