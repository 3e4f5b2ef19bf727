"""Finds the Chromium that tests and pictures use: Debian's, or the one that is named."""

from __future__ import annotations

import os
import shutil
import sys

__all__ = ["chromium"]

NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
VARIABLE = "DRIFTGATE_CHROMIUM"


def chromium() -> str:
    """Path of the browser. FileNotFoundError says how to get one."""
    named = os.environ.get(VARIABLE)
    found = named or next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        raise FileNotFoundError(
            f"no Chromium: `apt-get install chromium` (make setup tries it), or set {VARIABLE} to "
            "the path of one"
        )
    return found


if __name__ == "__main__":
    try:
        print(chromium())
    except FileNotFoundError as error:
        sys.exit(str(error))
