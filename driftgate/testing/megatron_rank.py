"""What torchrun starts in place of ``driftgate.teacher.rank`` where the Megatron backend is tested
on a CPU."""

from __future__ import annotations

import sys

from driftgate.teacher.rank import main
from driftgate.testing.megatron_cpu import megatron_on_cpu

if __name__ == "__main__":
    with megatron_on_cpu():
        sys.exit(main())
