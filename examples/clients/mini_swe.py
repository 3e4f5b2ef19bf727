"""mini-swe-agent, by its own command, in a toy repository with a real shell.

``python -m examples.clients.mini_swe toolcall --model NAME``
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from examples.clients import task

CONFIG = Path(__file__).with_suffix(".yaml")
TASK = "calc.py adds wrongly: repair it so that check.py says so."
FILES = {
    "calc.py": "def add(a, b):\n    return a - b\n",
    "check.py": "from calc import add\n\nprint('right' if add(2, 3) == 5 else 'wrong')\n",
}


def repository(folder: Path) -> None:
    """A commit with a mistake in it."""
    for name, text in FILES.items():
        (folder / name).write_text(text)
    git = ("git", "-c", "user.name=toy", "-c", "user.email=toy@localhost", "-C", str(folder))
    for words in (("init", "-q"), ("add", "."), ("commit", "-q", "-m", "Add")):
        subprocess.run([*git, *words], check=True, env=os.environ | DATES)


DATES = dict.fromkeys(("GIT_AUTHOR_DATE", "GIT_COMMITTER_DATE"), "2026-01-01T00:00:00Z")
"""The commit has the same name in every run: it stands in the agent's prompts."""

QUIET = {
    "MSWEA_CONFIGURED": "true",
    "MSWEA_SILENT_STARTUP": "1",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
}
"""Else mini asks for a key and a model at its first run, and litellm fetches a list of prices."""


def run(options: task.Options) -> list[Any]:
    """``mini`` from the command line; what it did is read from the file that it writes."""
    with tempfile.TemporaryDirectory() as scratch:
        folder, out = Path(scratch, "repository"), Path(scratch, "run.json")
        folder.mkdir()
        repository(folder)
        command = [
            *(str(Path(sys.executable).with_name("mini")), "-m", f"openai/{options.model}"),
            *("-t", TASK, "-y", "--exit-immediately", "-o", str(out), "-c", str(CONFIG)),
            *("-c", f"model.model_kwargs.seed={options.run}"),
        ]
        subprocess.run(
            command,
            cwd=folder,
            env=os.environ | QUIET | {"MSWEA_GLOBAL_CONFIG_DIR": scratch},
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr,
            check=True,
        )
        done = json.loads(out.read_text())
    return [
        task.said(
            message["content"],
            (
                task.call(c["function"]["name"], c["function"]["arguments"])
                for c in message["tool_calls"] or ()
            ),
        )
        for message in done["messages"]
        if message["role"] == "assistant"
    ]


if __name__ == "__main__":
    task.main(("mini-swe-agent",), {"toolcall": run})
