"""What is known of the engine behind the gateway, kept up to date in the background.

The gateway starts whether or not the engine is up. The first calls wait for one probe, so that
their traces name the engine; so do those behind an engine that was away. Another probe follows when
an answer carries a ``system_fingerprint`` that was not seen before, or a connection broke. Calls do
not wait for it: what is known of an engine holds until it is known to be another one.

Digesting the weights can take longer than calls may wait. The digest is part of an engine's
fingerprint, so answers from before and after it belong to different cells. Calls therefore wait for
it as well, but for no longer than ``FIRST_PROBE_WAIT_S`` behind the probe: a checkpoint that takes
longer costs a few traces in a cell without a digest, and no call more than those seconds."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time

import msgspec

from driftgate.adapters.base import EngineAdapter
from driftgate.adapters.vllm import Vllm
from driftgate.errors import UpstreamError
from driftgate.gateway.checkpoints import Digests
from driftgate.gateway.config import GatewayConfig
from driftgate.gateway.health import Health
from driftgate.gateway.metrics import Metrics
from driftgate.gateway.numerics import Numerics
from driftgate.gateway.openai import StreamMode
from driftgate.gateway.probe import ProbeReport, probe
from driftgate.gateway.tasks import beside, in_thread
from driftgate.gateway.weights import Weights as WeightVersions
from driftgate.trace import Engine

__all__ = ["Upstream", "tokenizer_of"]

FIRST_RETRY_S, LAST_RETRY_S = 1.0, 30.0
"""Waits between probes of an engine that does not answer, doubling; an engine loads for minutes."""

FIRST_PROBE_WAIT_S = 10.0
"""A call waits this long for the first probe, of however many engines; then its trace says
``unknown``."""

REPROBE_INTERVAL_S = 30.0
"""From one further probe to the next: each costs three generations, whatever the reason."""

MAX_FINGERPRINTS = 1000
"""An engine with more puts something else into that field."""

log = logging.getLogger("driftgate.upstream")


class Upstream:
    """The engine's report and the fingerprint that traces carry. Lives on the event loop."""

    def __init__(self, config: GatewayConfig, metrics: Metrics, *, url: str | None = None) -> None:
        """``url``: of one engine of several; else the configuration's first."""
        self.url = (url or config.urls[0]).rstrip("/")
        self.in_flight = 0
        """Calls that are there now, or were let in and are on their way."""
        self.paused: str | None = None
        """Why it takes no calls now, by the trainer's word."""
        self.paused_ns: int | None = None
        """Since when, wall clock, ns since the epoch."""
        self.takes_ids = True
        """Its chat completions take ids for the prompt; False as soon as it did not."""
        self.turn_ends: set[int] = set()
        """Ids that were proven to end a turn of its template."""
        self.weights = WeightVersions(config.weight_version)
        self.health = Health(
            self.url,
            config.upstream_key,
            self.weights,
            away=self._may_be_another,
            returned=self._returned,
        )
        self.report: ProbeReport | None = None
        """The last one; kept while the engine is away, so that late traces still name it."""
        self.error: str | None = "not probed yet"
        """Why the last probe failed; None while the engine is up."""
        self._config = config
        metrics.upstream_up.labels(self.url).set_function(lambda: float(self.available))
        self._numerics = Numerics(self.url, config.upstream_key)
        self._seen: set[str] = set()
        """Fingerprints that a probe was made for."""
        self._checkpoints: dict[str, str] = {}
        """Digest of the weights of each served model, as far as it is known."""
        self._digests = Digests()
        self._digested = asyncio.Event()
        self._digest_deadline = 0.0
        self._wanted = asyncio.Event()
        self._urgent = asyncio.Event()
        """Calls wait for the probe that is wanted."""
        self._probing = False
        self._tried = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    async def watch(self) -> None:
        """Probe until it succeeds, then whenever the engine seems to be another one."""
        self._loop = asyncio.get_running_loop()
        wait_s, next_probe = FIRST_RETRY_S, 0.0
        while True:
            self._wanted.clear()
            self._probing = True
            report = await self._probe()
            self._probing = False
            if self.error is not None:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(wait_s):
                        await self._wanted.wait()
                wait_s = min(2 * wait_s, LAST_RETRY_S)
                continue
            wait_s = FIRST_RETRY_S
            if report is None:
                self._wanted.set()  # it is well, and was too busy to be probed
                next_probe = self._loop.time() + REPROBE_INTERVAL_S
            async with beside("digest", self._digest(report)):
                await self._wanted.wait()
                await self._keep_distance(next_probe)
            next_probe = self._loop.time() + REPROBE_INTERVAL_S

    async def _keep_distance(self, until: float) -> None:
        """To the last probe, but where calls wait for the next one."""
        assert self._loop is not None, "watch runs"
        while self.error is None and self._loop.time() < until:
            self._urgent.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(until):
                    await self._urgent.wait()

    async def ready(self, deadline: float | None = None) -> None:
        """Wait for a probe, where the engine is not known to be up, and for the digest of its
        weights; at most one try, at most until ``deadline`` on the loop's clock."""
        if self.error is None and self._digested.is_set():
            return
        if deadline is None:
            deadline = asyncio.get_running_loop().time() + FIRST_PROBE_WAIT_S
        with contextlib.suppress(TimeoutError):
            if self.error is not None:
                if not self._probing:
                    self._wanted.set()
                async with asyncio.timeout_at(deadline):
                    await self._tried.wait()
            if self.error is None:
                async with asyncio.timeout_at(min(deadline, self._digest_deadline)):
                    await self._digested.wait()

    @property
    def available(self) -> bool:
        """Calls can be expected to be answered there."""
        return self.error is None and self.health.error is None

    @property
    def why_away(self) -> str | None:
        """Why not; None where they can."""
        return self.error or self.health.error

    @property
    def adapter(self) -> EngineAdapter:
        """Names and shapes of the engine, as far as it was probed."""
        return Vllm() if self.report is None else self.report.adapter

    def serves(self, model: str) -> bool:
        """The engine has it, or is not known not to."""
        return self.report is None or any(info.id == model for info in self.report.models)

    def takes_over(self, other: Upstream) -> bool:
        """What was written for ``other`` can be sent here as it is."""
        return self._asked_as == other._asked_as

    @property
    def _asked_as(self) -> tuple[object, ...]:
        """All that requests are written by."""
        return (
            self.adapter,
            self.stream_mode(),
            self.has_routes,
            self.refusal,
            self.system_first,
        )

    @property
    def system_first(self) -> bool:
        """Its template takes a system message nowhere but at the beginning."""
        return self.report is not None and self.report.system_first

    def stream_mode(self) -> StreamMode:
        """How streamed calls are asked for."""
        setting = self._config.streaming_routes
        if not self.adapter.streams_ids:
            return "synthesise"
        if setting == "off":
            return "plain"
        if setting != "auto":
            return setting
        if self.report is None or not self.report.routes:
            return "plain"
        return "plugin" if self.report.streaming_routes else "synthesise"

    @property
    def name(self) -> str:
        """What the engine calls itself, ``unknown`` before the first probe."""
        return "unknown" if self.report is None else self.report.engine

    @property
    def has_routes(self) -> bool | None:
        """Answers carry routed experts, so that one without them misses something; None: not
        known."""
        if self.report is None or not self.report.answered:
            return None
        return self.report.routes

    @property
    def refusal(self) -> str | None:
        """Why requests must go on as they are: the engine refuses what capture adds to them."""
        return None if self.report is None else self.report.refusal

    @property
    def version(self) -> str:
        """``unknown`` before the first probe."""
        return "unknown" if self.report is None else self.report.version

    @property
    def tokenizer(self) -> str | None:
        """Stands for what gives its ids, as ``tokenizer_of`` a trace of it. None: not known."""
        if self.report is None:
            return None
        known = self.report.texts | self._config.engine_settings
        return known.get("tokenizer") or self.report.system_fingerprint

    def engine(self, model: str, fingerprint: str | None, sent_ns: int | None = None) -> Engine:
        """The fingerprint of the engine that gave an answer, which was asked for at ``sent_ns``
        (None: now). Any thread."""
        report = self.report
        if fingerprint is not None and report is not None:
            self._notice(fingerprint, time.time_ns() if sent_ns is None else sent_ns)
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
            settings=report.default_settings
            | report.flags
            | self._numerics.setting(fingerprint or report.system_fingerprint)
            | self._config.engine_settings,
        )

    def lost(self) -> None:
        """A call could not reach the engine: it may come back as another one."""
        if self.error is None:
            self._wanted.set()

    def _may_be_another(self, why: str, from_ns: int | None = None) -> None:
        """What a trainer told of its weights holds no more since it was seen well last, or since
        ``from_ns``, when another one is known to have been there. Any thread."""
        well_ns, told = self.health.well_ns, self.weights.version
        if well_ns is None:
            return
        since_ns = well_ns if from_ns is None else min(well_ns, from_ns)
        if self.weights.lose(since_ns, time.time_ns(), why):
            log.warning(
                "%s: its weight version is unknown now, %s was told before: %s; tell it again",
                self.url,
                told,
                why,
            )

    def _returned(self, was_away: bool) -> None:
        """It answers again. Where it was away, it may have another build or other flags now."""
        if was_away:
            self._numerics.forget()
            self.takes_ids = True
            self.turn_ends.clear()
            self.error = "it was away and is probed again"
            self._urgent.set()
        self._wanted.set()

    def _notice(self, fingerprint: str, sent_ns: int) -> None:
        """Want a probe for a fingerprint that is new. Several may answer behind one address."""
        if fingerprint in self._seen or len(self._seen) >= MAX_FINGERPRINTS:
            return
        if self._seen:
            self._may_be_another(f"its system_fingerprint {fingerprint} is new", sent_ns)
        self._seen.add(fingerprint)
        log.warning("the engine's system_fingerprint %s is new: probing it again", fingerprint)
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._wanted.set)

    async def _probe(self) -> ProbeReport | None:
        """Probe and publish what is found; None where nothing new was learned."""
        try:
            asked_ns = time.time_ns()
            report = await probe(self.url, key=self._config.upstream_key)
            self.health.well_ns = max(asked_ns, self.health.well_ns or 0)
            known = await asyncio.to_thread(self._digests.known, report.models)
            if self._says_less(report):
                log.warning("%s told nothing of itself: %s", self.url, "; ".join(report.notes))
                self.error = None
                return None
            self._publish(report, known)
        except UpstreamError as error:
            self._not_probed(str(error))
            return None
        except Exception as error:  # a bug: without this task nobody would probe again
            log.exception("probing %s failed; it is tried again", self.url)
            self._not_probed(f"probing it failed: {type(error).__name__}")
            return None
        else:
            return report
        finally:
            self._tried.set()
            self._tried = asyncio.Event()

    def _not_probed(self, why: str) -> None:
        log.warning("%s", why)
        if self.error is None and self.health.error is None:
            return  # it is well, and holds for what it is known as
        self.error = why
        self._numerics.forget()

    def _says_less(self, report: ProbeReport) -> bool:
        """The engine is known, and answers no question now: its weights may be broken."""
        known = self.report
        if known is None or not known.answered or report.answered or report.refusal is not None:
            return False
        return (known.version, known.models) == (report.version, report.models)

    def _publish(self, report: ProbeReport, known: dict[str, str] | None) -> None:
        """Name the engine from here on, with the digests that need no reading of weights."""
        if known is None or not self._numerics.known(report):
            self._digested.clear()
            self._digest_deadline = asyncio.get_running_loop().time() + FIRST_PROBE_WAIT_S
        else:
            self._digested.set()
        self._checkpoints = known or {}
        if self.report is None or self.report.system_fingerprint != report.system_fingerprint:
            self.turn_ends.clear()
        self.error = None
        self.report = self._with_digest(report)
        if report.system_fingerprint is not None:
            self._seen.add(report.system_fingerprint)
        self.health.read_weights(report.adapter.weights_path)
        log.info("engine %s %s serves %s", report.engine, report.version, report.model)
        for note in report.notes:
            log.info("engine: %s", note)

    def _with_digest(self, report: ProbeReport) -> ProbeReport:
        return msgspec.structs.replace(report, checkpoint=self._checkpoints.get(report.model))

    async def _digest(self, report: ProbeReport | None) -> None:
        """Digest the weights, a minute for a large checkpoint, and name the engine with them."""
        try:
            if report is not None and not self._digested.is_set():
                async with beside("numerics", self._numerics.read(report, self.weights)) as asked:
                    self._checkpoints = await in_thread(
                        "digest", lambda: self._digests.read(report.models)
                    )
                    self.report = self._with_digest(report)
                    await asked
        except Exception:  # a bug, at the edge of this task
            log.exception("%s: reading its weights or numerics failed", self.url)
        finally:
            self._digested.set()


def tokenizer_of(engine: Engine) -> str | None:
    """The digest of an engine's tokenizer, or where that cannot be read its
    ``system_fingerprint``."""
    return engine.settings.get("tokenizer") or engine.system_fingerprint
