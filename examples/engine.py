"""An engine to try things on: a tiny checkpoint and a real vLLM on CPU, ``python -m
examples.engine``.

The model is random: what it says means nothing, its numbers are as real as a large one's.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
from pathlib import Path

from driftgate.testing.checkpoints import make_checkpoint
from driftgate.testing.engine import START_TIMEOUT_S, launch_vllm, stop, wait_for_http

__all__ = ["main"]


def main() -> None:
    """Serve until Ctrl-C or SIGTERM."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kind", choices=("dense", "moe"), default="moe")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--dir", type=Path, default=Path("runs/tutorial"))
    options = parser.parse_args()
    checkpoint = make_checkpoint(options.dir / options.kind, options.kind)
    engine = launch_vllm(
        checkpoint,
        name=f"tiny-{options.kind}",
        log=options.dir / "vllm.log",
        routes=options.kind == "moe",
        port=options.port,
    )
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with contextlib.suppress(KeyboardInterrupt):
            health = f"{engine.url}/health"
            wait_for_http(health, engine.process, engine.log, timeout_s=START_TIMEOUT_S)
            print(f"vLLM serves {engine.model} from {checkpoint} at {engine.url}", flush=True)
            engine.process.wait()
    finally:
        stop(engine.process)


if __name__ == "__main__":
    main()
