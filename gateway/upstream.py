"""What is known of the engine behind the gateway, kept up to date in the background.

The gateway starts whether or not the engine is up. The first calls wait for one probe, so that
their traces name the engine; another probe follows when the engine's ``system_fingerprint``
changes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from pathlib import Path

import msgspec

from driftgate.adapters.base import EngineAdapter
from driftgate.adapters.hf import checkpoint_digest
from driftgate.errors import TeacherError, UpstreamError
from driftgate.gateway.config import GatewayConfig
from driftgate.gateway.metrics import Metrics
from driftgate.gateway.openai import StreamMode
from driftgate.gateway.probe import ProbeReport, probe
from driftgate.trace import Engine

__all__ = ["Upstream"]

FIRST_RETRY_S, LAST_RETRY_S = 1.0, 30.0
"""Waits between probes of an engine that does not answer, doubling; an engine loads for minutes."""

FIRST_PROBE_WAIT_S = 10.0
"""A call waits this long for the first probe; then its trace says ``unknown``."""

log = logging.getLogger("driftgate.upstream")


class Upstream:
    """The engine's report and the fingerprint that traces carry. Lives on the event loop."""

    def __init__(self, config: GatewayConfig, adapter: EngineAdapter, metrics: Metrics) -> None:
        self.report: ProbeReport | None = None
        """The last one; kept while the engine is away, so that late traces still name it."""
        self.error: str | None = "not probed yet"
        """Why the last probe failed; None while the engine is up."""
        self._config = config
        self._adapter = adapter
        self._metrics = metrics
        self._checkpoints: dict[str, str | None] = {}
        self._wanted = asyncio.Event()
        self._tried = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    async def watch(self) -> None:
        """Probe until it succeeds, then whenever the engine seems to be another one."""
        self._loop = asyncio.get_running_loop()
        wait_s = FIRST_RETRY_S
        while True:
            self._wanted.clear()
            if await self._probe():
                wait_s = FIRST_RETRY_S
                await self._wanted.wait()
                continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._wanted.wait()
            wait_s = min(2 * wait_s, LAST_RETRY_S)

    async def ready(self) -> None:
        """Wait for a probe, where the engine is not known to be up; at most one try, at most some
        seconds."""
        if self.error is None:
            return
        self._wanted.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FIRST_PROBE_WAIT_S):
                await self._tried.wait()

    def stream_mode(self) -> StreamMode:
        """How streamed calls are asked for."""
        setting = self._config.streaming_routes
        if setting == "off":
            return "plain"
        if setting != "auto":
            return setting
        if self.report is None or not self.report.routes:
            return "plain"
        return "plugin" if self.report.streaming_routes else "synthesise"

    @property
    def gives_routes(self) -> bool:
        """Answers carry routed experts, so that one without them misses something."""
        return self.report is not None and self.report.routes

    def engine(self, model: str, fingerprint: str | None) -> Engine:
        """The fingerprint of the engine that gave an answer. Any thread."""
        report = self.report
        if fingerprint is not None and report and fingerprint != report.system_fingerprint:
            self._changed(fingerprint)
        mode = self._config.logprobs_mode
        if report is None:
            return Engine(
                name="unknown",
                version="unknown",
                model=model,
                system_fingerprint=fingerprint,
                logprobs_mode=mode,
                settings=self._config.engine_settings,
            )
        return Engine(
            name=report.engine,
            version=report.version,
            model=model,
            system_fingerprint=fingerprint or report.system_fingerprint,
            logprobs_mode=report.logprobs_mode if mode == "unknown" else mode,
            checkpoint=self._checkpoints.get(model),
            settings=self._config.engine_settings,
        )

    def lost(self) -> None:
        """A call could not reach the engine: it may come back as another one."""
        if self.error is None:
            self._wanted.set()

    def _changed(self, fingerprint: str) -> None:
        log.warning("the engine's system_fingerprint is now %s: probing it again", fingerprint)
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._wanted.set)

    async def _probe(self) -> bool:
        try:
            report = await probe(
                self._config.upstream, key=self._config.upstream_key, adapter=self._adapter
            )
            await asyncio.to_thread(self._read_checkpoints, report)
        except UpstreamError as error:
            self.error = str(error)
            self._metrics.upstream_up.set(0)
            log.warning("%s", error)
            return False
        finally:
            self._tried.set()
            self._tried = asyncio.Event()
        self.error = None
        self.report = msgspec.structs.replace(
            report, checkpoint=self._checkpoints.get(report.model)
        )
        self._metrics.upstream_up.set(1)
        log.info("engine %s %s serves %s", report.engine, report.version, report.model)
        for note in report.notes:
            log.info("engine: %s", note)
        return True

    def _read_checkpoints(self, report: ProbeReport) -> None:
        """Digest the weights of models whose directory is readable here (seconds for a large
        one)."""
        for info in report.models:
            self._checkpoints.setdefault(info.id, None)
            if info.root is None or not Path(info.root).is_dir():
                continue
            try:
                self._checkpoints[info.id] = checkpoint_digest(info.root)
            except (TeacherError, OSError) as error:
                log.info("the weights of %s have no digest: %s", info.id, error)
