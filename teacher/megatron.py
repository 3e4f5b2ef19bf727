"""Megatron-Core as a stand-alone trainer: builds the model of this rank from a Hugging Face
checkpoint and attaches to it, as a training job attaches to its own.

For small models: every rank reads the whole checkpoint into memory before it keeps its part.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

with warnings.catch_warnings():
    # Said several times, and known: the local spec is used on purpose.
    warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.transformer.moe import moe_utils

    from driftgate.adapters.megatron import attach
    from driftgate.adapters.megatron_weights import build

from driftgate.adapters.hf import model_limit
from driftgate.adapters.hf_digest import checkpoint_digest
from driftgate.adapters.hf_texts import text_digests
from driftgate.errors import TeacherError
from driftgate.teacher.attached import AttachedBackend
from driftgate.teacher.config import TeacherConfig
from driftgate.teacher.reference import is_moe, load_model

__all__ = ["MegatronBackend", "layout_of", "start"]


class MegatronBackend(AttachedBackend):
    """One rank of the stand-alone trainer. Rank 0 calls ``score``; every other rank calls
    ``serve``."""

    @classmethod
    def load(cls, config: TeacherConfig) -> MegatronBackend:
        """Join the process group that torchrun describes in the environment and build the model.

        Raises ``TeacherError`` where there is no device for it, or no mapping for the model.
        """
        _pick_device(config)
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        root = Path(config.model)
        start(config)
        model = load_model(config)
        if is_moe(model.config) and not hasattr(moe_utils, "te_general_gemm"):
            raise TeacherError(
                "megatron-core routes a mixture of experts by TransformerEngine, which is not "
                "installed: pip install 'transformer-engine[pytorch]', or use --backend fsdp"
            )
        digest = [checkpoint_digest(root) if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(digest, src=0)
        return cls(
            attach(build(model, layout_of(config), model_limit(model))),
            name=root.resolve().name,
            checkpoint=digest[0],
            train_dtype=config.train_dtype,
            texts=text_digests(root),
        )

    def close(self) -> None:
        """Dismiss the others, then leave the process groups; every rank does, and none that
        failed: the others may be inside a forward, where they would never hear of it."""
        if self.rank == 0:
            self.dismiss()
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def start(config: TeacherConfig) -> None:
    """Megatron's process groups for the layout of ``config``; nothing is random in scoring."""
    tensor_parallel.random.initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor_parallel,
        pipeline_model_parallel_size=config.pipeline_parallel,
        expert_model_parallel_size=config.expert_parallel,
        expert_tensor_parallel_size=1,
    )


def layout_of(config: TeacherConfig) -> dict[str, Any]:
    """The parallel sizes, as ``TransformerConfig`` names them."""
    return {
        "tensor_model_parallel_size": config.tensor_parallel,
        "pipeline_model_parallel_size": config.pipeline_parallel,
        "expert_model_parallel_size": config.expert_parallel,
        "sequence_parallel": config.sequence_parallel,
    }


def _pick_device(config: TeacherConfig) -> None:
    """Raises ``TeacherError`` where Megatron-Core, which asks CUDA for its device, has none."""
    try:
        if config.device == "cpu":
            raise RuntimeError("--device cpu was given")
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.cuda.current_device()
    except (RuntimeError, AssertionError) as error:
        said = str(error).splitlines()[0]
        raise TeacherError(
            f"megatron-core runs on CUDA devices only ({said}); use --backend fsdp here"
        ) from error
