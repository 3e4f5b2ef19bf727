"""axe-core, the accessibility checker, run on a page."""

from __future__ import annotations

from pathlib import Path

from playwright.sync_api import Page

__all__ = ["COLOURS", "RULES", "violations"]

AXE = (Path(__file__).parent / "vendor" / "axe-core" / "axe.js").read_text()
RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]


COLOURS = ["color-contrast"]
"""What another colour scheme can break."""


def violations(page: Page, rules: list[str] = RULES) -> list[str]:
    """What axe finds, each with the first elements it is about."""
    if not page.evaluate("typeof axe === 'object'"):
        page.evaluate(AXE)
    options = {"runOnly": rules, "resultTypes": ["violations"]}
    found = page.evaluate("options => axe.run(options)", options)
    return [
        f"{v['id']}: {node['html'][:160]} {node['failureSummary']}"
        for v in found["violations"]
        for node in v["nodes"][:2]
    ]
