"""MkDocs hooks: which pages the site has, and how links in the sources become links in the site.

Documents link to files of the repository, so that they can be read there. In the site a link to a
file that has a page becomes a link to the page (``gateway/config.py`` is the configuration's
reference), and a link to any other file becomes its path as text.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from tools.reference import PAGES

__all__ = ["NAV", "on_config", "on_files", "on_page_markdown"]

ROOT = Path(__file__).parents[1]

COPIED = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "storage/FORMAT.md": "reference/format.md",
}
"""Documents outside of docs/ and their pages."""

SPOKEN_FOR = {
    "gateway/config.py": "reference/configuration.md",
    "teacher/config.py": "reference/configuration.md",
    "driftgate/cli.py": "reference/cli.md",
    "gateway/api.py": "reference/api.md",
    "gateway/metrics.py": "reference/prometheus.md",
    "driftgate/glossary.py": "reference/metrics.md",
    "driftgate/codes.py": "reference/reasons.md",
    "driftgate/profiles.py": "reference/reasons.md",
    "driftgate/gates.py": "reference/reasons.md",
    "docs/design": "design/index.md",
}
"""Sources and the page that is made of them."""

NAV: dict[str, dict[str, str]] = {
    "Start": {"Overview": "index.md", "Ten minutes": "tutorial.md"},
    "How to": {
        "Set up vLLM": "howto/vllm.md",
        "Several engines": "howto/engines.md",
        "Connect your agent": "howto/agent.md",
        "Clients that were run": "clients.md",
        "Put a trainer beside it": "trainer.md",
        "Run it in Docker": "howto/docker.md",
        "Watch it": "howto/watching.md",
        "Read a drift": "howto/drift.md",
        "Look at it": "dashboard.md",
        "Act on a verdict": "howto/verdicts.md",
        "Export to a trainer": "exports.md",
        "Read the tree of a run": "tree.md",
    },
    "Can it be trusted?": {
        "Threat model": "threat-model.md",
        "Science": "science.md",
        "Reliability": "reliability.md",
        "Benchmarks": "benchmarks.md",
    },
    "Reference": {
        "Configuration": "reference/configuration.md",
        "Command line": "reference/cli.md",
        "HTTP API": "reference/api.md",
        "Metrics of drift": "reference/metrics.md",
        "Reasons, verdicts, gates": "reference/reasons.md",
        "Prometheus metrics": "reference/prometheus.md",
        "On-disk format": "reference/format.md",
    },
}

LINK = re.compile(r"(?P<bang>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s]+)\)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The navigation, with every design note."""
    notes = [{_title(path): f"design/{path.name}"} for path in _notes()]
    nav: list[Any] = [
        {section: [{title: page} for title, page in pages.items()]}
        for section, pages in NAV.items()
    ]
    nav.append({"Design notes": ["design/index.md", *notes]})
    nav.append({"Project": [{"Contributing": "contributing.md"}, {"Changes": "changelog.md"}]})
    config.nav = nav
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The pages that are not in docs/."""
    for source, page in COPIED.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text("utf-8")))
    for page, make in PAGES.items():
        files.append(File.generated(config, page, content=make()))
    listed = [f"- [{_title(path)}]({path.name})" for path in _notes()]
    text = "\n".join(["# Design notes", "", "The reasons for decisions.", "", *listed, ""])
    files.append(File.generated(config, "design/index.md", content=text))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links to files of the repository, as links of the site. Code blocks stay as they are."""
    here = page.file.src_uri
    source = {v: k for k, v in COPIED.items()}.get(here, f"docs/{here}")

    def rewrite(found: re.Match[str]) -> str:
        target, _, anchor = found["target"].partition("#")
        if not target or "://" in target or here in PAGES or here == "design/index.md":
            return found[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        page_of = COPIED.get(path) or SPOKEN_FOR.get(path)
        if page_of is None and path.startswith("docs/") and files.get_file_from_path(path[5:]):
            page_of = path[5:]
        if page_of is None:
            return found["text"] if "`" in found["text"] else f"`{found['text']}`"
        link = posixpath.relpath(page_of, posixpath.dirname(here) or ".")
        return f"{found['bang']}[{found['text']}]({link}{'#' + anchor if anchor else ''})"

    blocks = re.split(r"(^```.*?^```$)", markdown, flags=re.M | re.S)
    return "".join(b if b.startswith("```") else LINK.sub(rewrite, b) for b in blocks)


def _notes() -> list[Path]:
    return sorted((ROOT / "docs" / "design").glob("*.md"))


def _title(path: Path) -> str:
    """A document's first heading."""
    first = path.read_text("utf-8").partition("\n")[0]
    return first.removeprefix("# ").strip()
