"""The oracle: one process, plain Hugging Face, nothing sharded. Other backends must equal it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError

from driftgate.adapters.hf import inspect_model, model_limit, text_config
from driftgate.adapters.hf_digest import checkpoint_digest
from driftgate.adapters.hf_texts import text_digests
from driftgate.errors import TeacherError
from driftgate.teacher.base import SliceResult
from driftgate.teacher.batches import SEQUENCES_AT_ONCE, Batching, groups
from driftgate.teacher.config import BATCH_TOKENS, TeacherConfig
from driftgate.teacher.scorer import Scorer
from driftgate.teacher.sequences import Sequence
from driftgate.trace import Reason, Trainer

__all__ = ["ReferenceBackend", "fingerprint", "load_model", "pick_device"]

log = logging.getLogger(__name__)


class ReferenceBackend:
    """A model in this process. Give it one that you built yourself, or ``load`` a checkpoint."""

    def __init__(
        self,
        model: Any,
        *,
        name: str,
        checkpoint: str | None = None,
        train_dtype: str | None = None,
        texts: Mapping[str, str] | None = None,
        batching: Batching = "alone",
        batch_tokens: int = BATCH_TOKENS,
    ) -> None:
        """``texts``: of `text_digests`, where the model comes from a checkpoint."""
        self._batching, self._batch_tokens = batching, batch_tokens
        self.parallel = 1 if batching == "alone" else SEQUENCES_AT_ONCE
        self._device = next(model.parameters()).device
        self._scorer = Scorer(model).eval().requires_grad_(False)
        self.findings: list[Reason] = inspect_model(model)
        self.vocab_size = int(text_config(model).vocab_size)
        self.max_tokens = model_limit(model)
        self.trainer = fingerprint(
            model,
            backend="reference",
            name=name,
            checkpoint=checkpoint,
            ordered=self._scorer.probe(self._device, batching),
            findings=self.findings,
            train_dtype=train_dtype,
            texts=texts,
            batching=batching,
        )
        self.no_replay = self._scorer.no_replay

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
            texts=text_digests(root),
            batching=config.batching,
            batch_tokens=config.batch_tokens,
        )

    def score(self, sequences: Seq[Sequence]) -> list[SliceResult]:
        """Results in order; one forward per sequence unless batching was asked for."""
        lengths = [len(one.ids) for one in sequences]
        found: list[list[SliceResult]] = [[] for _ in sequences]
        try:
            for group in groups(lengths, self._batching, self._batch_tokens):
                fed = [sequences[index] for index in group]
                results = self._scorer.run(fed, self._device, self._batching)
                for index, mine in zip(group, results, strict=True):
                    found[index] = mine
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and "allocate" not in str(error):
                raise
            longest = max(lengths)
            raise TeacherError(f"out of memory at {longest} tokens: {error}") from error
        return [result for mine in found for result in mine]

    def close(self) -> None:
        """Nothing to release."""


def load_model(config: TeacherConfig) -> Any:
    """The checkpoint on the CPU in the precision asked for.

    ``from_pretrained(dtype=…)`` keeps the rotary buffers in float32; ``model.to(dtype)`` would not.
    Raises ``TeacherError`` if it is no checkpoint, or if its weights are not the whole model:
    transformers would fill what is missing with random numbers, and warn.
    """
    try:
        described = transformers.AutoConfig.from_pretrained(config.model, local_files_only=True)
        # transformers refuses the setting for a dense model.
        chosen = config.experts if is_moe(described) else None
        experts = {"experts_implementation": chosen} if chosen else {}
        with _own_words():
            model, loaded = transformers.AutoModelForCausalLM.from_pretrained(
                config.model,
                dtype=config.dtype,
                attn_implementation=config.attention,
                local_files_only=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **experts,
            )
    except (OSError, ValueError, SafetensorError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise TeacherError(f"cannot load the checkpoint {config.model}: {said}") from error
    _check_whole(config.model, loaded)
    return model


@contextmanager
def _own_words() -> Iterator[None]:
    """Keep transformers from printing its table of weights: `_check_whole` says it in a line."""
    level = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.utils.logging.set_verbosity(level)


def _check_whole(model_dir: str, loaded: Mapping[str, Any]) -> None:
    """Raises ``TeacherError`` unless every weight of the model came from the files."""
    missing = sorted(loaded["missing_keys"])
    if missing:
        raise TeacherError(
            f"cannot load the checkpoint {model_dir}: {len(missing)} weights of its config.json "
            f"are not in its files, the first is {missing[0]}"
        )
    mismatched = sorted(loaded["mismatched_keys"], key=lambda key: str(key[0]))
    if mismatched:
        name, stored, wanted = mismatched[0]
        raise TeacherError(
            f"cannot load the checkpoint {model_dir}: {len(mismatched)} weights have other shapes "
            f"than its config.json says, the first is {name}: {list(stored)}, not {list(wanted)}"
        )
    unused = sorted(loaded["unexpected_keys"])
    if unused:
        log.warning(
            "%s holds %d weights that the model does not use, the first is %s",
            model_dir,
            len(unused),
            unused[0],
        )


def pick_device(config: TeacherConfig) -> torch.device:
    """The device that ``config`` asks for; ``auto`` takes CUDA where there is one. TeacherError
    where CUDA is asked for and is not there."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise TeacherError(
            f"--device cuda: torch {torch.__version__} finds no CUDA device; install a build for "
            "CUDA, or take --device cpu"
        )
    if config.device != "auto":
        return torch.device(config.device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def is_moe(described: Any) -> bool:
    """True for a transformers config of a mixture of experts, whatever it calls their number."""
    return any("experts" in key for key in described.to_dict())


def fingerprint(
    model: Any,
    *,
    backend: str,
    name: str,
    checkpoint: str | None,
    ordered: bool,
    findings: Seq[Reason],
    train_dtype: str | None = None,
    texts: Mapping[str, str] | None = None,
    world_size: int = 1,
    batching: Batching = "alone",
) -> Trainer:
    """Everything of this trainer that changes its numbers."""
    config = model.config
    device = next(model.parameters()).device
    settings = {
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "attention": str(config._attn_implementation),
        **(texts or {}),
    }
    if is_moe(config):
        settings["experts"] = str(getattr(config, "_experts_implementation", None))
    if train_dtype is not None:
        settings["train_dtype"] = train_dtype
    if batching != "alone":
        settings["batching"] = batching
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
