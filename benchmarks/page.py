"""The dashboard with a response of 10,000 tokens, in Chromium: how long a person waits.

From a click or from pointing at a token to the frame that shows it, and the time between frames
while the tokens are scrolled from end to end. ``python -m benchmarks page``.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

from playwright.async_api import Page, async_playwright

from benchmarks.report import Section, Table
from driftgate.gateway.app import serve
from driftgate.gateway.config import GatewayConfig
from driftgate.storage import Record
from driftgate.testing.stores import write_store
from driftgate.testing.traces import make_intent, make_score, make_trajectory
from tools.browser import chromium

__all__ = ["run"]

TOKENS = 10_000
RUNS = 5
HOW = f"""\
One answer of {TOKENS:,} tokens from the gateway's own page, {RUNS} times, drawn by the processor:
opened, coloured anew by each measure, scrolled from end to end in 120 frames, and pointed at here
and there. A frame at 60 Hz is 17 ms, and what is asked for within one is seen in the next; at
100 ms a person sees a wait."""

MODES = ("abs", "p", "entropy", "d")
SCROLL_FRAMES = 120
HOVERS = 60

SWITCH = """async mode => {
  const start = performance.now();
  document.querySelector(`input[name=mode][value=${mode}]`).click();
  await new Promise(r => requestAnimationFrame(() => requestAnimationFrame(r)));
  return performance.now() - start;
}"""
"""ms from the click until the frame after the one that was drawn for it."""

SCROLL = """async frames => {
  const box = document.querySelector('[role=listbox]');
  const gaps = [];
  let last = await new Promise(requestAnimationFrame);
  for (let i = 0; i <= frames; i++) {
    box.scrollTop = box.scrollHeight * i / frames;
    const now = await new Promise(requestAnimationFrame);
    gaps.push(now - last);
    last = now;
  }
  return gaps;
}"""
"""ms between frames, from the first token to the last."""


HOVER = """async count => {
  const tokens = [...document.querySelectorAll('[role=option]')];
  const place = document.querySelector('aside.facts');
  const took = [];
  for (let i = 0; i < count; i++) {
    const token = tokens[Math.floor(tokens.length * i / count)];
    const start = performance.now();
    token.dispatchEvent(new MouseEvent('mouseover', {bubbles: true}));
    const said = `${token.dataset.i} of the response`;
    do await new Promise(requestAnimationFrame); while (!place.textContent.includes(said));
    took.push(performance.now() - start);
  }
  return took;
}"""
"""ms from pointing at a token to the frame that says all about it."""


def run(progress: Callable[[str], None]) -> Section:
    """Measure in a browser of this machine, without a graphics card."""
    import asyncio

    switches, gaps, opened, hovers = asyncio.run(_measure(progress))
    rows = [
        ["open the answer", *_spread(opened)],
        *([f"colour by {mode}", *_spread(switches[mode])] for mode in MODES),
        ["frame while scrolling", *_spread(gaps)],
        ["point at a token", *_spread(hovers)],
    ]
    table = Table(f"{TOKENS:,} tokens, headless Chromium, ms", ("what", "median", "worst"), rows)
    return Section(name="page", title="A long response on the page", how=HOW, tables=[table])


def _spread(values: list[float]) -> list[str]:
    return [f"{statistics.median(values):.0f}", f"{max(values):.0f}"]


def _records() -> Iterator[Record]:
    for trace in make_trajectory("long", steps=1, response=TOKENS, routed=False):
        yield from (make_intent(trace), trace, make_score(trace))


async def _measure(
    progress: Callable[[str], None],
) -> tuple[dict[str, list[float]], list[float], list[float], list[float]]:
    switches: dict[str, list[float]] = {mode: [] for mode in MODES}
    gaps: list[float] = []
    opened: list[float] = []
    hovers: list[float] = []
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []  # root has no user namespaces
    with tempfile.TemporaryDirectory() as scratch:
        store = write_store(Path(scratch) / "store", _records())
        config = GatewayConfig(upstream="http://127.0.0.1:9", store=store, port=0)
        async with serve(config) as url, async_playwright() as playwright:
            browser = await playwright.chromium.launch(executable_path=chromium(), args=arguments)
            for number in range(RUNS):
                progress(f"page: run {number + 1} of {RUNS}")
                page = await browser.new_page(viewport={"width": 1280, "height": 900})
                opened.append(await _open(page, f"{url}/#/t/long"))
                for mode in MODES:
                    switches[mode].append(cast(float, await page.evaluate(SWITCH, mode)))
                gaps += cast(list[Any], await page.evaluate(SCROLL, SCROLL_FRAMES))
                hovers += cast(list[Any], await page.evaluate(HOVER, HOVERS))
                await page.close()
            await browser.close()
    return switches, gaps, opened, hovers


async def _open(page: Page, url: str) -> float:
    """ms from the address to all tokens on the page."""
    await page.goto(url)
    await page.locator(f"#token-{TOKENS - 1}").wait_for(state="attached")
    return cast(float, await page.evaluate("performance.now()"))
