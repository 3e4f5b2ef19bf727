"""Copies pinned front-end parts from npm into the tree: ``make web-vendor``.

There is no build step: browsers load these files as they are. To change a version, change ``PARTS``
here and run it; the manifests it writes hold what npm's registry and this run saw, and a test
compares every vendored file with them.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import shutil
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["FOLDERS", "MANIFEST", "digest", "main"]

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "gateway" / "web" / "vendor"
"""What the dashboard loads; shipped in the package."""
TESTS = ROOT / "tests" / "web" / "vendor"
"""What only the tests load."""
FOLDERS = (PAGE, TESTS)

MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One npm package: what is taken from it and what it is called here."""

    name: str
    version: str
    integrity: str
    """npm's SHA-512 of the tarball: what was reviewed is what is copied."""
    licence: str
    files: dict[str, str]
    edits: dict[str, str] = field(default_factory=dict)
    """Bare imports, which browsers do not resolve without an import map, to relative ones."""
    folder: Path = PAGE


PARTS = (
    Part(
        name="preact",
        version="11.2.0",
        integrity="sha512-/HfHI/7N84e6GrWBJ3J280z3mLaRJiDcSvj/A+y/4AbLnND/1UlGH"
        "e1sR6oYuTGwId0nP7dqDU9OnLxMPZ7xBg==",
        licence="MIT",
        files={
            "dist/preact.mjs": "preact.js",
            "hooks/dist/hooks.mjs": "hooks.js",
            "LICENSE": "LICENSE.txt",
        },
        edits={'from"preact"': 'from"./preact.js"'},
    ),
    Part(
        name="htm",
        version="3.1.1",
        integrity="sha512-983Vyg8NwUE7JkZ6NmOqpCZ+sh1bKv2iYTlUkzlWmA5JD2acKoxd4"
        "KVxbMmxX/85mtfdnDmTFoNKcg5DGAvxNQ==",
        licence="Apache-2.0",
        files={"dist/htm.module.js": "htm.js", "LICENSE": "LICENSE.txt"},
    ),
    Part(
        name="uplot",
        version="1.6.32",
        integrity="sha512-KIMVnG68zvu5XXUbC4LQEPnhwOxBuLyW1AHtpm6IKTXImkbLgkMy+"
        "jabjLgSLMasNuGGzQm/ep3tOkyTxpiQIw==",
        licence="MIT",
        files={
            "dist/uPlot.esm.js": "uplot.js",
            "dist/uPlot.min.css": "uplot.css",
            "LICENSE": "LICENSE.txt",
        },
    ),
    Part(
        name="axe-core",
        version="4.14.1",
        integrity="sha512-FHfa+lmNjQZfJz1q8wKqIDwC6DExcHt/pkjNQb09a3NPjCKg2rhu5"
        "qb2S4r76ASyFNNtuFooJpZe37OgudVGtQ==",
        licence="MPL-2.0",
        files={"axe.min.js": "axe.js", "LICENSE": "LICENSE.txt"},
        folder=TESTS,
    ),
)


def digest(data: bytes) -> str:
    """SHA-256, hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def main() -> None:
    """Fetch every part, check it, and replace the vendored folders."""
    fetched = {part.name: _fetch(part) for part in PARTS}
    for folder in FOLDERS:
        shutil.rmtree(folder, ignore_errors=True)
        entries = [_copy(part, fetched[part.name]) for part in PARTS if part.folder == folder]
        (folder / MANIFEST).write_text(json.dumps(entries, indent=2) + "\n")
        print(f"{folder.relative_to(ROOT)}: {', '.join(e['name'] for e in entries)}")


def _fetch(part: Part) -> bytes:
    """The package's tarball through the npm client. SystemExit where it is not the reviewed one."""
    with tempfile.TemporaryDirectory() as scratch:
        command = ["npm", "pack", f"{part.name}@{part.version}", "--pack-destination", scratch]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        (tarball,) = Path(scratch).glob("*.tgz")
        data = tarball.read_bytes()
    found = "sha512-" + base64.b64encode(hashlib.sha512(data).digest()).decode()
    if found != part.integrity:
        raise SystemExit(
            f"{part.name} {part.version} has integrity {found}, not {part.integrity!r}: review it, "
            f"then write that into {Path(__file__).name}"
        )
    return data


def _copy(part: Part, tarball: bytes) -> dict[str, Any]:
    """Write the part's files and return its entry of the manifest."""
    folder = part.folder / part.name
    folder.mkdir(parents=True)
    digests = {}
    with tarfile.open(fileobj=io.BytesIO(tarball)) as archive:
        for source, target in part.files.items():
            member = archive.extractfile(f"package/{source}")
            assert member is not None
            data = member.read()
            for old, new in part.edits.items():
                data = data.replace(old.encode(), new.encode())
            (folder / target).write_bytes(data)
            digests[target] = digest(data)
    return {
        "name": part.name,
        "version": part.version,
        "integrity": part.integrity,
        "licence": part.licence,
        "sha256": digests,
    }


if __name__ == "__main__":
    main()
