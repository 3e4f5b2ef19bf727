"""Pictures of the dashboard for the docs, from a real run: ``make pictures``.

Serves a copy of the demo's store (``runs/demo/store``; ``make demo`` writes it) and writes
``docs/img/NAME-SCHEME.png`` in both colour schemes. Nothing in a picture is made up.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import tempfile
from pathlib import Path

from playwright.async_api import Browser, Route, async_playwright

from driftgate.client import Client
from driftgate.gateway.alarms import OF_NOW
from driftgate.gateway.app import serve
from driftgate.gateway.config import GatewayConfig
from driftgate.live_views import Overview
from tools.browser import chromium

STORE = Path("runs/demo/store")
PICTURES = Path("docs/img")
SCHEMES = ("light", "dark")
WIDTH, HEIGHT = 1280, 900
SCALE = 1.5
"""Device pixels for one of CSS: sharp enough, and half the bytes of 2."""

SHOW = {"trajectory": "section[aria-labelledby=response]"}
"""What is brought to the top of a picture; the others begin with the page."""

BELOW_THE_HEAD = "e => scrollTo(0, e.getBoundingClientRect().top + scrollY - 60)"
"""The page's head stays where it is."""

NO_ENGINE = "http://127.0.0.1:9"
"""Looking at a store needs none."""


async def views(url: str) -> dict[str, str]:
    """Address of each picture's view; the worst token and its trajectory are those of the store."""
    async with Client(url) as client:
        overview = await client.overview()
    worst = worst_place(overview)
    return {
        "overview": "",
        "matrix": "matrix",
        "trajectory": worst,
        "verdict": worst.split("?")[0],
        "live": "live",
        "glossary": "glossary",
    }


def worst_place(overview: Overview) -> str:
    """Address of the worst token. SystemExit where nothing comparable is in the store."""
    if not overview.worst:
        raise SystemExit(f"{STORE} holds no comparable score: run `make demo`")
    found = overview.worst[0]
    worst = found.worst
    return f"t/{found.trajectory}?step={worst.step}&choice={worst.choice}&token={worst.token_index}"


async def without_its_engine(route: Route) -> None:
    """The demo's engine has ended: that is of this tool, not of the run that is shown."""
    said = await route.fetch()
    now = await said.json()
    now["alarms"] = [alarm for alarm in now["alarms"] if alarm["code"] not in OF_NOW]
    await route.fulfill(response=said, json=now)


async def draw(browser: Browser, url: str, folder: Path) -> None:
    """Write each view in each scheme."""
    addresses = await views(url)
    for scheme in SCHEMES:
        page = await browser.new_page(
            viewport={"width": WIDTH, "height": HEIGHT},
            device_scale_factor=SCALE,
            color_scheme="dark" if scheme == "dark" else "light",
            reduced_motion="reduce",
        )
        await page.route("**/api/overview", without_its_engine)
        for name, address in addresses.items():
            await page.goto("about:blank")
            await page.goto(f"{url}/#/{address}", wait_until="load")
            await page.locator("main h1").first.wait_for()
            await page.locator("main table").first.wait_for()
            await page.locator(".waiting").first.wait_for(state="detached")
            if name in SHOW:
                await page.locator(SHOW[name]).evaluate(BELOW_THE_HEAD)
            path = folder / f"{name}-{scheme}.png"
            await page.screenshot(path=path, animations="disabled")
            print(path)
        await page.close()


async def main() -> None:
    """Serve the store, open the browser, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--store", type=Path, default=STORE)
    parser.add_argument("--out", type=Path, default=PICTURES)
    options = parser.parse_args()
    if not options.store.is_dir():
        raise SystemExit(f"{options.store} is not there: run `make demo`, or give --store")
    options.out.mkdir(parents=True, exist_ok=True)
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []  # root has no user namespaces
    with tempfile.TemporaryDirectory() as scratch:
        store = shutil.copytree(options.store, Path(scratch) / "store")
        config = GatewayConfig(upstream=NO_ENGINE, store=store, port=0)
        async with serve(config) as url, async_playwright() as playwright:
            browser = await playwright.chromium.launch(executable_path=chromium(), args=arguments)
            await draw(browser, url, options.out)
            await browser.close()


if __name__ == "__main__":
    asyncio.run(main())
