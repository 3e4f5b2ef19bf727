"""The oracle: one process, plain Hugging Face, nothing sharded. Other backends must equal it."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import torch
import transformers

from driftgate.adapters.hf import checkpoint_digest, inspect_model
from driftgate.errors import TeacherError
from driftgate.teacher.base import SliceResult
from driftgate.teacher.config import TeacherConfig
from driftgate.teacher.scorer import Scorer
from driftgate.teacher.sequences import Sequence
from driftgate.trace import Reason, Trainer

__all__ = ["ReferenceBackend", "fingerprint", "load_model", "model_limit", "pick_device"]


class ReferenceBackend:
    """A model in this process. Give it one that you built yourself, or ``load`` a checkpoint."""

    parallel = 1

    def __init__(
        self,
        model: Any,
        *,
        name: str,
        checkpoint: str | None = None,
        train_dtype: str | None = None,
    ) -> None:
        self._device = next(model.parameters()).device
        self._scorer = Scorer(model).eval().requires_grad_(False)
        self.findings: list[Reason] = inspect_model(model)
        self.vocab_size = int(model.config.vocab_size)
        self.max_tokens = model_limit(model)
        self.trainer = fingerprint(
            model,
            backend="reference",
            name=name,
            checkpoint=checkpoint,
            ordered=self._scorer.probe(self._device),
            findings=self.findings,
            train_dtype=train_dtype,
        )

    @classmethod
    def load(cls, config: TeacherConfig) -> ReferenceBackend:
        """Load ``config.model``. Raises ``TeacherError`` if it is no usable checkpoint."""
        model = load_model(config).to(pick_device(config))
        root = Path(config.model)
        return cls(
            model,
            name=root.resolve().name,
            checkpoint=checkpoint_digest(root),
            train_dtype=config.train_dtype,
        )

    def score(self, sequences: Seq[Sequence]) -> list[SliceResult]:
        """One forward per sequence, in order."""
        try:
            return [part for one in sequences for part in self._scorer.run(one, self._device)]
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and "allocate" not in str(error):
                raise
            longest = max(len(sequence.ids) for sequence in sequences)
            raise TeacherError(f"out of memory at {longest} tokens: {error}") from error

    def close(self) -> None:
        """Nothing to release."""


def load_model(config: TeacherConfig) -> Any:
    """The checkpoint on the CPU in the precision asked for.

    ``from_pretrained(dtype=…)`` keeps the rotary buffers in float32; ``model.to(dtype)`` would not.
    """
    try:
        described = transformers.AutoConfig.from_pretrained(config.model, local_files_only=True)
        # transformers refuses the setting for a dense model.
        chosen = config.experts if is_moe(described) else None
        experts = {"experts_implementation": chosen} if chosen else {}
        return transformers.AutoModelForCausalLM.from_pretrained(
            config.model,
            dtype=config.dtype,
            attn_implementation=config.attention,
            local_files_only=True,
            **experts,
        )
    except (OSError, ValueError) as error:
        raise TeacherError(f"cannot load the checkpoint {config.model}: {error}") from error


def pick_device(config: TeacherConfig) -> torch.device:
    """The device that ``config`` asks for; ``auto`` takes CUDA where there is one."""
    if config.device != "auto":
        return torch.device(config.device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def is_moe(described: Any) -> bool:
    """True for a transformers config of a mixture of experts, whatever it calls their number."""
    return any("experts" in key for key in described.to_dict())


def model_limit(model: Any) -> int:
    """Positions that the model was made for."""
    return int(getattr(model.config, "max_position_embeddings", 1 << 20))


def fingerprint(
    model: Any,
    *,
    backend: str,
    name: str,
    checkpoint: str | None,
    ordered: bool,
    findings: Seq[Reason],
    train_dtype: str | None = None,
    world_size: int = 1,
) -> Trainer:
    """Everything of this trainer that changes its numbers."""
    config = model.config
    device = next(model.parameters()).device
    settings = {
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "attention": str(config._attn_implementation),
    }
    if is_moe(config):
        settings["experts"] = str(getattr(config, "_experts_implementation", None))
    if train_dtype is not None:
        settings["train_dtype"] = train_dtype
    if findings:
        settings["findings"] = ",".join(sorted({finding.code for finding in findings}))
    return Trainer(
        backend=backend,
        model=name,
        checkpoint=checkpoint,
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        world_size=world_size,
        routes_ordered=ordered,
        settings=settings,
    )
