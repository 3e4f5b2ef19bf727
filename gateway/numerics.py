"""A fingerprint of an engine's arithmetic: the hash of what it makes of one fixed prompt.

Versions and flags do not say all: another kernel, driver or GPU gives other numbers under the same
names. So a plain prompt (no chat template: some write the date) is continued greedily, with its
log-probabilities, and hashed. The prompt is asked twice, each time past the prefix cache. Only what
comes out the same is a fingerprint: where two tries differ, as on a busy engine whose numbers
depend on the batch, there is none rather than a new one each time.

The numbers are those of the weights, too. An engine whose weights a trainer replaces in place is
not asked again before it restarts; one that was already updated when it is first seen has none."""

from __future__ import annotations

import hashlib
import logging
import uuid
from typing import TYPE_CHECKING, Any, NamedTuple

import aiohttp
import msgspec

from driftgate.errors import UNREADABLE
from driftgate.gateway.probe_answers import typed
from driftgate.gateway.weights import Weights

if TYPE_CHECKING:
    from driftgate.gateway.probe import ProbeReport

__all__ = ["PROMPT", "SETTING", "Numerics", "fingerprint_of"]

SETTING = "numerics"
"""Name in ``Engine.settings``."""

PROMPT = "Numbers in order: one, two, three, four, five. Weekdays in order: Monday, Tuesday,"
"""About 20 tokens of any tokenizer. Changing it makes every engine another one."""

MAX_TOKENS = 16
DECIMALS = 2
"""nats. In bfloat16 logits between 8 and 16 lie 0.06 apart, so that another precision or kernel
shows; sums of float32 in another order, which differ by 1e-5 from run to run, do not."""

TRIES = 3
"""Until two in a row agree."""

TIMEOUT_S = 30.0
MAX_BYTES = 1 << 20

log = logging.getLogger("driftgate.upstream")


class _Reading(NamedTuple):
    engine: str | None
    """``system_fingerprint``: several engines may answer behind one address."""
    digest: str


class Numerics:
    """What one engine's arithmetic was found to be."""

    def __init__(self, url: str, key: str | None) -> None:
        self._url = url
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._found: dict[str | None, str | None] = {}
        """None: it has none."""

    def known(self, report: ProbeReport) -> bool:
        """Nothing is left to ask of this engine."""
        return not report.logprobs or report.system_fingerprint in self._found

    def forget(self) -> None:
        """The engine was away: it may compute in another way now."""
        self._found.clear()

    def setting(self, engine: str | None) -> dict[str, str]:
        """For the fingerprint of the engine with this ``system_fingerprint``; empty where it has
        none. Any thread."""
        digest = self._found.get(engine)
        return {} if digest is None else {SETTING: digest}

    async def read(self, report: ProbeReport, weights: Weights) -> None:
        """Ask the engine that was probed, unless it is known."""
        if self.known(report):
            return
        if weights.version != weights.configured:
            log.info("%s: no numerical fingerprint: its weights were updated in place", self._url)
            self._found[report.system_fingerprint] = None
            return
        last: _Reading | None = None
        for _ in range(TRIES):
            reading = await self._ask(report.model)
            if reading is None:
                break
            if reading == last:
                self._found[reading.engine] = reading.digest
                break
            last = reading
        else:
            log.warning("%s: no numerical fingerprint: it differs from try to try", self._url)
        self._found.setdefault(report.system_fingerprint, None)

    async def _ask(self, model: str) -> _Reading | None:
        body = {
            "model": model,
            "prompt": PROMPT,
            "max_tokens": MAX_TOKENS,
            "temperature": 0,
            "seed": 0,
            "logprobs": 1,
            "ignore_eos": True,
            "cache_salt": uuid.uuid4().hex,
        }
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
        try:
            async with (
                aiohttp.ClientSession(headers=self._headers, timeout=timeout) as session,
                session.post(self._url + "/v1/completions", json=body) as answer,
            ):
                raw = await answer.content.read(MAX_BYTES)
                while not answer.content.at_eof() and len(raw) < MAX_BYTES:
                    raw += await answer.content.read(MAX_BYTES)
            said = msgspec.json.decode(raw, type=dict[str, Any])
            digest = fingerprint_of(said["choices"][0]["logprobs"])
        except (aiohttp.ClientError, TimeoutError, OSError, *UNREADABLE) as error:
            log.info("%s: no numerical fingerprint: %s", self._url, error)
            return None
        except (KeyError, IndexError, TypeError, ValueError) as error:
            log.info(
                "%s: no numerical fingerprint: its answer has no logprobs: %r", self._url, error
            )
            return None
        return _Reading(typed(said, "system_fingerprint", str), digest)


def fingerprint_of(logprobs: dict[str, Any]) -> str:
    """12 hex digits over the tokens and logprobs [nats] of a completion. ValueError, TypeError or
    KeyError where they are none."""
    values = [round(float(value), DECIMALS) + 0.0 for value in logprobs["token_logprobs"]]
    rows = list(zip(logprobs["tokens"], values, strict=True))
    if not rows:
        raise ValueError("no tokens came")
    return hashlib.sha256(msgspec.json.encode(rows)).hexdigest()[:12]
