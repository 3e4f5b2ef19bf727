"""A Megatron-Core model inside a training job: its log-probabilities and its routes, and no trace
of the visit.

What is undone here, so that nobody after it has to know: rows are sequence-major, a rank holds its
chunk of them under sequence parallelism and its layers under pipeline parallelism, and
``layer_number`` counts all layers from 1.

Refused, with words: fewer than Megatron-Core 0.16, context parallelism, virtual pipeline stages,
fused routers (which bypass ``RouterReplay`` silently), and routers that draw random numbers.

Shape letters: ``S`` positions that this rank's routers see, ``T`` positions fed, ``N`` positions
asked for, ``E`` experts, ``K`` experts per token, ``L`` MoE layers, ``H`` hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any, TypeAlias, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.dot_product_attention import DotProductAttention
from torch import Tensor, nn

from driftgate.adapters.hf import UINT8_EXPERTS, Routed
from driftgate.adapters.megatron_tap import RouterTap, routers
from driftgate.adapters.trainer import Forced, Head, Place
from driftgate.errors import TeacherError
from driftgate.trace import Reason, Routes

__all__ = ["MegatronModel", "attach"]

R = TypeVar("R")
Inputs: TypeAlias = dict[str, Tensor | None]
"""Of the model's forward, by name."""

FIXES = {
    "context_parallel_size": "attach to a model without context parallelism",
    "virtual_pipeline_model_parallel_size": "attach to a model without virtual stages",
    "moe_router_fusion": "switch it off: a fused router does not say what it chose",
    "moe_input_jitter_eps": "unset it: no two forwards agree under random input",
    "moe_router_force_load_balancing": "unset it: it routes by random numbers",
    "moe_expert_capacity_factor": "unset it: which tokens are dropped depends on the batch",
}
"""Settings of ``TransformerConfig`` that make the numbers of one sequence wrong, and what to do."""


def attach(model: Any) -> MegatronModel:
    """The adapter of a built model; call it on every rank, with what this rank trains.

    ``model``: a ``GPTModel``, or a list of one, inside any of Megatron's wrappers (DDP, mixed
    precision). Raises ``TeacherError`` for a model that it cannot measure, in words.
    """
    return MegatronModel(_unwrapped(model))


class MegatronModel:
    """See ``TrainerAdapter``."""

    backend = "megatron"

    def __init__(self, model: GPTModel) -> None:
        self._model = model
        self._config = model.config
        _refuse(self._config)
        groups = model.pg_collection
        self._tp, self._pp = groups.tp, groups.pp
        self._first = dist.get_rank(self._pp) == 0
        self._last = dist.get_rank(self._pp) == dist.get_world_size(self._pp) - 1
        self._routers = routers(model)
        self.device = next(model.parameters()).device
        self.vocab_size = int(model.vocab_size)
        self.max_tokens = int(model.max_sequence_length)
        self.place = self._find_place()
        self.shared_length = int(self._config.expert_model_parallel_size) > 1
        self.no_replay = None if self._layer_ids() else "the trainer's model has no routers"
        self.findings: list[Reason] = []
        self.settings = _settings(model)

    def forward(
        self,
        ids_T: Tensor,
        rows_N: Tensor,
        reduce: Callable[[Head], R],
        *,
        length: int,
        forced: Forced | None = None,
    ) -> tuple[R | None, Routed | None]:
        """See ``TrainerAdapter``."""
        padded = self._padded(ids_T, length)
        with _undisturbed(self._model), self._tapped(len(padded), forced) as taps:
            reduced = self._through(padded, lambda inputs: self._reduced(inputs, rows_N, reduce))
        routed = self._routed(taps, rows_N)
        return reduced, routed if self.place.has_routes else None

    def own_logprobs(self, ids_T: Tensor, targets_T: Tensor) -> Tensor | None:
        """See ``TrainerAdapter``: minus Megatron's own vocab-parallel loss."""
        padded = self._padded(ids_T, len(ids_T))
        labels = torch.zeros_like(padded)
        labels[: len(targets_T)] = targets_T

        def loss(inputs: Inputs) -> Tensor:
            whole: Tensor = self._model(**inputs, labels=labels[None])
            return whole[0, : len(targets_T)]

        with _undisturbed(self._model), self._tapped(len(padded), None):
            found = self._through(padded, loss)
        return -found if found is not None and self.place.has_head else None

    def _find_place(self) -> Place:
        """Which copy of the model this rank is part of: named by its first stage's first rank."""
        mine = dist.get_process_group_ranks(self._tp), dist.get_process_group_ranks(self._pp)
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        leaders = [everyone[stages[0]][0][0] for _, stages in everyone]
        copies = sorted(set(leaders))
        leads = dist.get_rank(self._tp) == 0
        return Place(
            replica=copies.index(leaders[dist.get_rank()]),
            replicas=len(copies),
            has_head=leads and self._last,
            has_routes=leads,
        )

    def _padded(self, ids_T: Tensor, length: int) -> Tensor:
        """``ids_T`` on the device with as many more ids as ``length`` and sequence parallelism
        ask for. A causal model's earlier positions do not see them."""
        chunks = dist.get_world_size(self._tp) if self._config.sequence_parallel else 1
        total = -(-max(length, len(ids_T)) // chunks) * chunks
        padded = torch.zeros(total, dtype=torch.int64, device=self.device)
        padded[: len(ids_T)] = ids_T
        return padded

    def _through(self, ids_T: Tensor, last: Callable[[Inputs], R]) -> R | None:
        """One forward through all pipeline stages; ``last`` makes the last one's."""
        stages, stage = dist.get_process_group_ranks(self._pp), dist.get_rank(self._pp)
        ids_1T = ids_T[None]
        positions_1T = torch.arange(len(ids_T), device=self.device)[None]
        inputs = {
            "input_ids": ids_1T,
            "position_ids": positions_1T,
            "attention_mask": self._mask(len(ids_T)),
        }
        if not self._first:
            self._model.set_input_tensor(self._received(len(ids_T), stages[stage - 1]))
        try:
            if self._last:
                return last(inputs)
            hidden_S1H = self._model(**inputs)
            dist.send(hidden_S1H.contiguous(), stages[stage + 1], group=self._pp)
            return None
        finally:
            self._model.set_input_tensor(None)

    def _received(self, tokens: int, source: int) -> Tensor:
        chunks = dist.get_world_size(self._tp) if self._config.sequence_parallel else 1
        hidden_S1H = torch.empty(
            (tokens // chunks, 1, self._config.hidden_size),
            dtype=self._config.pipeline_dtype or self._config.params_dtype,
            device=self.device,
        )
        dist.recv(hidden_S1H, source, group=self._pp)
        return hidden_S1H

    def _mask(self, tokens: int) -> Tensor | None:
        """Megatron's own attention needs the causal mask (True: hidden) spelled out; others derive
        it from their mask type."""
        if not any(isinstance(one, DotProductAttention) for one in self._model.modules()):
            return None
        ones = torch.ones((1, 1, tokens, tokens), dtype=torch.bool, device=self.device)
        return ones.triu_(1)

    def _reduced(self, inputs: Inputs, rows_N: Tensor, reduce: Callable[[Head], R]) -> R | None:
        """The last stage: hidden states, gathered where they are in chunks, and then the head."""
        with _until_hidden(self._model):
            hidden_S1H = self._model(**inputs)
        if self._config.sequence_parallel:
            hidden_S1H = gather_from_sequence_parallel_region(
                hidden_S1H, tensor_parallel_output_grad=False, group=self._tp
            )
        with _whole_rows(self._model) as project:
            part = self._model.output_layer.output_size_per_partition
            shared = dist.get_world_size(self._tp) > 1
            head = Head(
                project=project,
                hidden_NH=hidden_S1H[rows_N, 0],
                group=self._tp if shared else None,
                first_id=part * dist.get_rank(self._tp),
            )
            reduced = reduce(head)
        return reduced if self.place.has_head else None

    @contextmanager
    def _tapped(self, tokens: int, forced: Forced | None) -> Iterator[dict[int, RouterTap]]:
        """Record what every router of this rank chooses, by absolute layer, or force it."""
        mine = self._chunk(tokens)
        ids = self._layer_ids() if forced is not None else ()
        taps: dict[int, RouterTap] = {}
        before = {layer: router.router_replay for layer, router in self._routers.items()}
        try:
            for layer, router in self._routers.items():
                taps[layer] = tap = RouterTap(router)
                if forced is not None:
                    tap.force(forced, ids.index(layer), mine, tokens)
                router.router_replay = tap
            yield taps
        finally:
            for layer, router in self._routers.items():
                router.router_replay = before[layer]

    def _layer_ids(self) -> tuple[int, ...]:
        """Absolute numbers of the model's MoE layers, those of other stages among them."""
        count, every = self._config.num_layers, self._config.moe_layer_freq
        if not self._config.num_moe_experts:
            return ()
        if isinstance(every, int):
            return tuple(range(0, count, every))
        return tuple(layer for layer in range(count) if every[layer])

    def _chunk(self, tokens: int) -> slice:
        """The positions whose rows this rank's routers see."""
        if not self._config.sequence_parallel:
            return slice(0, tokens)
        size = tokens // dist.get_world_size(self._tp)
        return slice(size * (rank := dist.get_rank(self._tp)), size * (rank + 1))

    def _routed(self, taps: dict[int, RouterTap], rows_N: Tensor) -> Routed | None:
        """What the routers of this stage chose at ``rows_N``; every rank of its group calls."""
        if not taps:
            return None
        missed = [layer for layer, tap in taps.items() if tap.chosen is None]
        if missed:
            raise TeacherError(
                f"no router choices came from layers {missed}: fused or skipped routers?"
            )
        chosen = [self._rows(tap.chosen, rows_N) for tap in taps.values()]
        margins = [self._rows(tap.margin, rows_N) for tap in taps.values()]
        routes = np.stack([one.cpu().numpy() for one in chosen], axis=1)
        margin = np.stack([one.cpu().numpy() for one in margins], axis=1)
        dtype = np.uint8 if self._config.num_moe_experts <= UINT8_EXPERTS else np.uint16
        by_softmax = all(tap.by_softmax for tap in taps.values())
        return Routed(
            routes=cast(Routes, routes.astype(dtype)),
            margins=margin if by_softmax else None,
            layer_ids=tuple(taps),
            experts=int(self._config.num_moe_experts),
            ordered=by_softmax and all(tap.ordered for tap in taps.values()),
        )

    def _rows(self, seen: Tensor | None, rows_N: Tensor) -> Tensor:
        """[S, …] of this rank to [N, …] of the sequence."""
        assert seen is not None
        if self._config.sequence_parallel:
            seen = gather_from_sequence_parallel_region(
                seen.contiguous(), tensor_parallel_output_grad=False, group=self._tp
            )
        return seen[rows_N]


def _unwrapped(model: Any) -> GPTModel:
    """The ``GPTModel`` of this rank, out of lists and wrappers."""
    if isinstance(model, list | nn.ModuleList):
        if len(model) != 1:
            raise TeacherError(
                f"the model has {len(model)} virtual pipeline stages on this rank; "
                f"{FIXES['virtual_pipeline_model_parallel_size']}"
            )
        (model,) = model
    while not isinstance(model, GPTModel):
        if not isinstance(model, nn.Module) or not hasattr(model, "module"):
            raise TeacherError(f"{type(model).__name__} is not a Megatron-Core GPTModel")
        model = model.module
    return model


def _refuse(config: Any) -> None:
    """Raises ``TeacherError`` for settings under which one sequence's numbers are wrong."""
    for name, fix in FIXES.items():
        value = getattr(config, name, None)
        off = value == 1 if name == "context_parallel_size" else not value
        if not off:
            raise TeacherError(f"the model has {name}={value!r}; {fix}")
    if config.num_moe_experts and not hasattr(config, "moe_enable_routing_replay"):
        raise TeacherError(f"megatron-core {version('megatron-core')} is older than 0.16")


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, and every module's mode as it was afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _until_hidden(model: GPTModel) -> Iterator[None]:
    """The model's forward ends with the last norm: no multi-token prediction, no logits."""
    before = model.post_process, model.mtp_process
    model.post_process = model.mtp_process = False
    try:
        yield
    finally:
        model.post_process, model.mtp_process = before


@contextmanager
def _whole_rows(model: GPTModel) -> Iterator[Callable[[Tensor], Tensor]]:
    """The model's own output layer on rows that are already gathered, its part of the vocabulary.

    The flag is set as Megatron's own inference sets it. A layer that defers its weight gradients
    keeps its inputs for the backward, of which there is none: they are taken out again.
    """
    layer = model.output_layer
    shared = model.share_embeddings_and_output_weights
    weight = model.shared_embedding_or_output_weight() if shared else None
    kept = getattr(model, "embedding_activation_buffer", None)
    length = len(kept) if kept is not None else 0
    before, layer.sequence_parallel = layer.sequence_parallel, False

    def project(hidden_CH: Tensor) -> Tensor:
        logits_C1V, _ = layer(hidden_CH[:, None], weight=weight, runtime_gather_output=False)
        return cast(Tensor, logits_C1V[:, 0])

    try:
        yield project
    finally:
        layer.sequence_parallel = before
        if kept is not None:
            del kept[length:]


def _settings(model: GPTModel) -> dict[str, str]:
    config = model.config
    layer = model.decoder.layers[0] if len(model.decoder.layers) else None
    said = {
        "torch": str(torch.__version__),
        "megatron-core": version("megatron-core"),
        "tp": str(config.tensor_model_parallel_size),
        "pp": str(config.pipeline_model_parallel_size),
        "sequence_parallel": str(bool(config.sequence_parallel)).lower(),
    }
    if layer is not None:
        said["attention"] = type(layer.self_attention.core_attention).__name__
    if config.num_moe_experts:
        said["ep"] = str(config.expert_model_parallel_size)
        said["dispatcher"] = str(config.moe_token_dispatcher_type)
        said["router_dtype"] = str(config.moe_router_dtype or "that of the model")
    return said
