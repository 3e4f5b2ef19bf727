"""A gateway over a real store, and a real Chromium in front of it.

Whatever a test does, it fails where the browser's console has an error, where a request leaves
this machine, and where the page sends anything but what it should.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from playwright.sync_api import Browser, BrowserContext, Page, ViewportSize, expect, sync_playwright

from driftgate.gateway.app import create_app
from driftgate.gateway.config import GatewayConfig
from driftgate.gateway.keys import digest_of
from driftgate.testing.stores import write_store
from tests.web.stores import page_records
from tools.browser import chromium

expect.set_options(timeout=20_000)  # patience on a busy machine: what is asserted has no time in it

WIDE = ViewportSize(width=1280, height=900)
PHONE = ViewportSize(width=390, height=844)


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("store"), page_records())


@pytest.fixture(scope="session")
def still(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same store, to which no test adds anything."""
    return write_store(tmp_path_factory.mktemp("still"), page_records())


@asynccontextmanager
async def serving(app: web.Application) -> AsyncIterator[str]:
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.5)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()


@contextmanager
def in_thread(make: Callable[[], web.Application]) -> Iterator[str]:
    """Serve an application on a thread of its own: the browser's driver has this one's loop."""
    started: list[str] = []
    ready, stop = threading.Event(), threading.Event()

    async def run() -> None:
        async with serving(make()) as url:
            started.append(url)
            ready.set()
            await asyncio.to_thread(stop.wait)

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    assert ready.wait(30)
    yield started[0]
    stop.set()
    thread.join(30)
    assert not thread.is_alive()


def gateway(root: Path, **options: Any) -> web.Application:
    # Nobody listens there: reading needs no engine.
    return create_app(GatewayConfig(upstream="http://127.0.0.1:9", store=root, **options))


@pytest.fixture(scope="session")
def url(root: Path) -> Iterator[str]:
    with in_thread(lambda: gateway(root)) as url:
        yield url


READ_KEY = "read-" + 20 * "k"


@pytest.fixture
def locked_url(root: Path) -> Iterator[str]:
    """A gateway that wants a key for reading."""
    with in_thread(lambda: gateway(root, read_keys=[digest_of(READ_KEY)])) as url:
        yield url


# Not for the session: the driver keeps a loop running on this thread, and other tests have theirs.
@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []  # root has no user namespaces
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=arguments)
        yield browser
        browser.close()


class Watched:
    """A page and what went wrong on it."""

    def __init__(self, context: BrowserContext, url: str) -> None:
        self.home = url
        """What stands before the ``#`` of every view."""
        self.wrong: list[str] = []
        self.allowed: tuple[str, ...] = ()
        """Parts of console messages that the test provokes."""
        self.page: Page = context.new_page()
        self.page.on("console", lambda m: self._note(m.type in ("error", "warning"), m.text))
        self.page.on("pageerror", lambda error: self._note(True, str(error)))
        self.page.on("request", lambda r: self._note(not self._known(r.url), f"asked {r.url}"))

    def _known(self, url: str) -> bool:
        """Of this gateway or of this report's folder."""
        return url.startswith((self.home.rpartition("/")[0] + "/", "blob:", "data:"))

    def _note(self, bad: bool, text: str) -> None:
        if bad and not any(part in text for part in self.allowed):
            self.wrong.append(text)

    def open(self, view: str = "") -> Page:
        """Load a view anew and wait until nothing loads."""
        self.page.goto("about:blank")  # else only the hash changes
        self.page.goto(f"{self.home}#/{view}")
        self.settled()
        return self.page

    def go(self, view: str) -> Page:
        """As ``open``, by a link within the page: quicker, and what people do."""
        self.page.evaluate(GO, f"#/{view}")
        self.settled()
        return self.page

    def settled(self) -> None:
        self.page.locator("main h1").first.wait_for()
        expect(self.page.locator(".waiting")).to_have_count(0)


GO = """hash => new Promise(resolve => {
  if (location.hash === hash) return resolve();
  const drawn = () => requestAnimationFrame(() => requestAnimationFrame(resolve));
  addEventListener('hashchange', drawn, {once: true});
  location.hash = hash;
})"""
"""Resolves when the view is drawn, with what it waits for."""


@pytest.fixture
def make_page(browser: Browser, url: str) -> Iterator[Callable[..., Watched]]:
    contexts: list[BrowserContext] = []
    pages: list[Watched] = []

    def make(
        *, scheme: str = "light", viewport: ViewportSize = WIDE, at: str | None = None
    ) -> Watched:
        context = browser.new_context(
            color_scheme="dark" if scheme == "dark" else "light",
            viewport=viewport,
            reduced_motion="reduce",
        )
        contexts.append(context)
        pages.append(Watched(context, at or f"{url}/"))
        return pages[-1]

    yield make
    for context in contexts:
        context.close()
    assert [page.wrong for page in pages if page.wrong] == []
