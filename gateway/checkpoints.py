"""Digests of the weights that an engine serves, where the gateway can read their folder."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

from driftgate.adapters.hf_digest import checkpoint_digest
from driftgate.errors import TeacherError
from driftgate.gateway.probe import ModelInfo

__all__ = ["Digests"]

Files: TypeAlias = tuple[tuple[str, int, int], ...]
"""Path, time of change [ns] and size [bytes] of each file of a checkpoint."""

log = logging.getLogger("driftgate.upstream")


class Digests:
    """Of one engine's checkpoints, each read once until its files change. Any thread."""

    def __init__(self) -> None:
        self._found: dict[Files, str | None] = {}
        """None: it could not be read."""
        self._reading = threading.Lock()

    def known(self, models: Sequence[ModelInfo]) -> dict[str, str] | None:
        """By model, of weights that have not changed since they were read; None if one has."""
        found: dict[str, str] = {}
        for info in models:
            files = _files(info.root)
            if files and files not in self._found:
                return None
            if (digest := self._found.get(files)) is not None:
                found[info.id] = digest
        return found

    def read(self, models: Sequence[ModelInfo]) -> dict[str, str]:
        """By model; a minute for a large checkpoint."""
        with self._reading:  # a probe may come before the last one's weights are read
            for info in models:
                files = _files(info.root)
                if info.root is None or not files or files in self._found:
                    continue
                try:
                    self._found[files] = checkpoint_digest(info.root)
                except (TeacherError, OSError) as error:
                    self._found[files] = None
                    log.info("the weights of %s have no digest: %s", info.id, error)
        return self.known(models) or {}


def _files(root: str | None) -> Files:
    """What the digest is over; empty where it is not readable here."""
    if root is None:
        return ()
    try:
        files = [*sorted(Path(root).glob("*.safetensors")), Path(root, "config.json")]
        said = [(str(path), path.stat()) for path in files]
    except OSError:
        return ()
    return tuple((path, stat.st_mtime_ns, stat.st_size) for path, stat in said)
