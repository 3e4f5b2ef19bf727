"""A disk that is slow or turns read-only under a running gateway, by ``disk.c`` preloaded into it.

A mounted file system cannot do that on demand: the kernel refuses to remount one on which a file is
open for writing, and real disks do it by failing. Needs a C compiler.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

__all__ = ["SlowDisk", "compiler"]

SOURCE = Path(__file__).with_name("disk.c")
_CONTROL = struct.Struct("=iii")


def compiler() -> str | None:
    """The C compiler, where there is one."""
    return shutil.which("cc")


class SlowDisk:
    """The disk below one store. Every process that is started with ``wrap`` suffers from it."""

    def __init__(self, store: Path) -> None:
        """Compile, and be a good disk for now."""
        cc, library = compiler(), store.with_name(f"{store.name}-disk.so")
        assert cc is not None, "ask compiler() first"
        flags = ("-O2", "-shared", "-fPIC", "-o", str(library), str(SOURCE), "-ldl")
        subprocess.run([cc, *flags], check=True, timeout=60)
        control = store.with_name(f"{store.name}-disk.control")
        control.write_bytes(bytes(_CONTROL.size))
        with control.open("r+b") as file:
            self._control = mmap.mmap(file.fileno(), _CONTROL.size)
        self.wrap = (
            "env",
            f"LD_PRELOAD={library}",
            f"RELIABILITY_DISK_CONTROL={control}",
            f"RELIABILITY_DISK_STORE={store}",
        )
        """Before a gateway's command."""

    def be(self, *, sync_ms: int = 0, write_ms: int = 0, fails_with: int = 0) -> None:
        """What each sync and each write takes, and the errno that they fail with, from now on."""
        _CONTROL.pack_into(self._control, 0, sync_ms, write_ms, fails_with)

    @contextlib.contextmanager
    def read_only(self) -> Iterator[None]:
        """As a file system that found an error in itself."""
        self.be(fails_with=errno.EROFS)
        try:
            yield
        finally:
            self.be()
