"""Asks an engine what it is and what it gives, with a handful of one-token requests.

The answer is a report in plain values; what is missing comes with a sentence on how to switch it
on."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from typing import Any

import aiohttp
import msgspec

from driftgate.adapters.base import EngineAdapter
from driftgate.adapters.engines import adapter_for
from driftgate.adapters.hf_texts import text_digests
from driftgate.errors import UNREADABLE, UpstreamError
from driftgate.gateway.flags import ServerInfo, cache_flags, read_info
from driftgate.gateway.generation_config import defaults_of
from driftgate.gateway.http import without_key
from driftgate.gateway.probe_answers import (
    COLD,
    WARM,
    choice_of,
    chunks_of,
    logprobs_mode,
    prompt_ids_of,
    top_of,
    typed,
)
from driftgate.trace import LogprobsMode

__all__ = ["ModelInfo", "ProbeReport", "probe"]

CONNECT_TIMEOUT_S = 5.0
REQUEST_TIMEOUT_S = 60.0
"""One token, behind whatever the engine is busy with."""

MAX_PROBE_BYTES = 16 << 20
"""Of one answer to the probe; a few tokens with routes are kilobytes."""


_PROMPT = [{"role": "user", "content": "Say something."}]


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One entry of ``/v1/models``."""

    id: str
    root: str | None = None
    """Where the engine read the weights from."""
    max_model_len: int | None = None
    parent: str | None = None
    """The model that an adapter is of: vLLM says the limit there only."""
    owned_by: str | None = None


class ProbeReport(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine is and gives."""

    url: str
    engine: str
    """``vllm``, ``sglang`` or ``unknown``."""
    version: str
    models: list[ModelInfo]
    model: str
    """The one that was asked."""
    system_fingerprint: str | None = None
    token_ids: bool = False
    logprobs: bool = False
    route_shape: tuple[int, int] | None = None
    """(layers, experts per token), where the adapter needs them to read routes."""
    flags: dict[str, str] = {}
    """What the server says of how it computes, as settings of its fingerprint."""
    routes: bool = False
    """JSON answers carry routed experts."""
    streaming: bool = False
    """Streams carry ids and logprobs."""
    streaming_routes: bool = False
    """driftgate's plugin runs in the engine."""
    logprobs_mode: LogprobsMode = "unknown"
    checkpoint: str | None = None
    """Digest of the weights, where ``root`` is a directory that is readable here."""
    sampling_defaults: dict[str, float] | None = None
    """What the engine takes for each of ``facts.NEUTRAL_DEFAULTS`` where a request does not say, by
    the model's ``generation_config.json``; None where ``root`` is not readable here."""
    texts: dict[str, str] = {}
    """Digests of the model's tokenizer and chat template; empty where ``root`` is not readable
    here."""
    system_first: bool = False
    """The template takes a system message nowhere but at the beginning."""
    answered: bool = True
    """The question for all of this was answered: what did not come is not there."""
    refusal: str | None = None
    """Why answers cannot be captured: the engine refuses a request only for what we add to it."""
    notes: list[str] = []
    """A sentence for each missing thing, with how to switch it on."""

    @property
    def adapter(self) -> EngineAdapter:
        """Names and shapes of this engine."""
        return adapter_for(self.engine, self.route_shape)

    def max_tokens(self, model: str) -> int | None:
        """Of prompt and answer; None where it is not known."""
        info = next((info for info in self.models if info.id == model), None)
        if info is None or info.max_model_len is not None:
            return None if info is None else info.max_model_len
        known = (base.max_model_len for base in self.models if base.id == info.parent)
        return next(known, None)

    @property
    def default_settings(self) -> dict[str, str]:
        """``sampling_defaults`` and ``texts`` as settings of an engine's fingerprint."""
        known = self.sampling_defaults or {}
        return {f"default_{name}": f"{value:g}" for name, value in known.items()} | self.texts

    @property
    def captures(self) -> bool:
        """Ids and logprobs come, whole and streamed: enough for a score."""
        return self.token_ids and self.logprobs and self.streaming


async def probe(
    url: str,
    *,
    key: str | None = None,
    model: str | None = None,
) -> ProbeReport:
    """Probe the engine at ``url`` (without ``/v1``). UpstreamError where none answers there."""
    headers = {"Accept-Encoding": "identity"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    timeout = aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S, sock_connect=CONNECT_TIMEOUT_S)
    async with aiohttp.ClientSession(headers=headers, timeout=timeout) as session:
        return await _Probe(session, url.rstrip("/"), key).run(model)


class _Refused(UpstreamError):
    """The engine answered 4xx."""


class _Probe:
    """The requests of one probe."""

    def __init__(self, session: aiohttp.ClientSession, url: str, key: str | None) -> None:
        self._session = session
        self._key = key
        self._url = url
        self._adapter = adapter_for("unknown")
        self._notes: list[str] = []
        self._unread = 0
        """Events of the stream that cannot be read."""
        self._refused: _Refused | None = None
        """The engine's answer to the question for ids and logprobs."""

    async def run(self, model: str | None) -> ProbeReport:
        models = await self._models()
        known = {info.id for info in models}
        if model is not None and model not in known:
            raise UpstreamError(f"{self._url} serves {sorted(known)}, not {model!r}")
        asked = model or models[0].id
        info = await self._introduce(models)
        warm = await self._ask(asked, WARM)
        mode: LogprobsMode = "unknown"
        choice = choice_of(warm)
        if typed(choice, "logprobs", dict):
            mode = logprobs_mode(top_of(warm), top_of(await self._ask(asked, COLD)))
            mode = self._adapter.logprobs_mode if mode == "unknown" else mode
        streamed = await self._stream(asked) if warm and self._adapter.streams_ids else []
        engine = _engine_name(models, warm)
        report = ProbeReport(
            url=self._url,
            engine=engine,
            version=info.version or await self._version(),
            route_shape=info.route_shape,
            flags=info.flags or await self._cache_flags(),
            models=models,
            model=asked,
            system_fingerprint=typed(warm, "system_fingerprint", str),
            token_ids=bool(prompt_ids_of(warm) and typed(choice, "token_ids", list)),
            logprobs=bool(typed(choice, "logprobs", dict)),
            routes=bool(typed(choice, "routed_experts", str)),
            streaming=not self._adapter.streams_ids
            or any(
                typed(choice, "token_ids", list) and typed(choice, "logprobs", dict)
                for choice in map(choice_of, streamed)
            ),
            streaming_routes=any(self._adapter.routes_chunk_mark in chunk for chunk in streamed),
            logprobs_mode=mode,
            sampling_defaults=await asyncio.to_thread(defaults_of, engine, models[0].root),
            texts=await asyncio.to_thread(_texts, models),
            answered=bool(warm),
            refusal=await self._refusal(asked),
            system_first=await self._system_first(asked),
        )
        return msgspec.structs.replace(report, notes=self._notes + self._missing(report))

    async def _models(self) -> list[ModelInfo]:
        body = await self._json("GET", "/v1/models")
        try:
            models = msgspec.convert(body.get("data"), list[ModelInfo])
        except msgspec.ValidationError as error:
            raise UpstreamError(
                f"{self._url}/v1/models is not a list of models: {error}"
            ) from error
        if not models:
            raise UpstreamError(f"{self._url} serves no model")
        return models

    async def _introduce(self, models: list[ModelInfo]) -> ServerInfo:
        """Take the engine's adapter, and what its flags say."""
        engine = _engine_name(models, {})
        self._adapter = adapter_for(engine)
        for path in self._adapter.info_paths:
            with contextlib.suppress(UpstreamError):
                info = read_info(await self._json("GET", path), models[0].root)
                self._adapter = adapter_for(engine, info.route_shape)
                return info
        return ServerInfo()

    async def _cache_flags(self) -> dict[str, str]:
        try:
            return cache_flags(await self._request("GET", "/metrics"))
        except UpstreamError:
            return {}

    async def _version(self) -> str:
        try:
            return str((await self._json("GET", "/version")).get("version", "unknown"))
        except UpstreamError:
            return "unknown"

    async def _ask(self, model: str, temperature: float) -> dict[str, Any]:
        try:
            raw = await self._request(
                "POST", "/v1/chat/completions", self._body(model, temperature)
            )
            answer = msgspec.json.decode(self._adapter.common(raw), type=dict[str, Any])
            if not choice_of(answer):
                self._notes.append("A chat completion holds no choice that can be read.")
            return answer
        except UNREADABLE as error:
            self._notes.append(f"A chat completion could not be read: {error}.")
            return {}
        except UpstreamError as error:
            self._refused = error if isinstance(error, _Refused) else None
            self._notes.append(f"A chat completion was refused: {error}.")
            return {}

    async def _refusal(self, model: str) -> str | None:
        """What the engine said, if it was to our fields: the same request without them passes."""
        if self._refused is None:
            return None
        try:
            await self._json("POST", "/v1/chat/completions", self._plain(model))
        except UpstreamError:
            return None  # no chat template, a key that is missing, …
        return f"the engine refuses requests for token ids and logprobs: {self._refused}"

    async def _system_first(self, model: str) -> bool:
        """It renders a system message at the beginning and refuses one behind that. Nothing is
        generated for it."""
        path = self._adapter.render_path
        if path is None:
            return False
        first = [_PROMPT[0] | {"role": "system"}, *_PROMPT]
        try:
            await self._request("POST", path, {"model": model, "messages": first * 2})
        except _Refused:
            with contextlib.suppress(UpstreamError):
                await self._request("POST", path, {"model": model, "messages": first})
                return True
        except UpstreamError:
            pass
        return False

    def _plain(self, model: str) -> dict[str, Any]:
        return {"model": model, "messages": _PROMPT, "max_tokens": 1, "seed": 0}

    def _body(self, model: str, temperature: float) -> dict[str, Any]:
        return (
            self._plain(model)
            | {
                "temperature": temperature,
                "logprobs": True,
                "top_logprobs": 2,
            }
            | {ask.field: True for ask in self._adapter.asks}
        )

    async def _stream(self, model: str) -> list[dict[str, Any]]:
        body = self._body(model, WARM) | {"stream": True, self._adapter.ask_stream_routes: True}
        try:
            raw = await self._request("POST", "/v1/chat/completions", body)
        except UpstreamError as error:
            self._notes.append(f"Streaming was refused: {error}.")
            return []
        chunks, unread = chunks_of(raw)
        if unread:
            self._unread = len(unread)
            self._notes.append(
                f"{self._unread} events of a stream cannot be read, the first: {unread[0]}."
            )
        return chunks

    async def _json(
        self, method: str, path: str, body: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        raw = await self._request(method, path, body)
        try:
            return msgspec.json.decode(raw, type=dict[str, Any])
        except UNREADABLE as error:
            raise UpstreamError(f"{self._url}{path} did not answer with JSON: {error}") from error

    async def _request(
        self, method: str, path: str, body: Mapping[str, Any] | None = None
    ) -> bytes:
        try:
            async with self._session.request(method, self._url + path, json=body) as response:
                raw = await response.content.read(MAX_PROBE_BYTES)
                while not response.content.at_eof() and len(raw) < MAX_PROBE_BYTES:
                    raw += await response.content.read(MAX_PROBE_BYTES)
                status = response.status
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:  # a bad address
            reason = str(error) or type(error).__name__
            raise UpstreamError(
                f"no engine answers at {self._url}: {reason}; start it, or correct the upstream URL"
            ) from error
        if status >= 400:
            said = without_key(raw, self._key)[:300].decode(errors="replace")
            kind = _Refused if status < 500 else UpstreamError
            raise kind(f"{method} {self._url}{path} answered {status}: {said}")
        return raw

    def _missing(self, report: ProbeReport) -> list[str]:
        advice = self._adapter.advice
        notes = []
        if not report.token_ids:
            notes.append(f"Answers carry no token ids: {advice('ids')}.")
        if not report.logprobs:
            notes.append(f"Answers carry no logprobs: {advice('logprobs')}.")
        unread = self._unread > 0  # then that is why
        if report.token_ids and report.logprobs and not (report.streaming or unread):
            notes.append("Streams carry no ids or logprobs: let agents ask without streaming.")
        if not report.routes:
            notes.append(f"Answers carry no routed experts: {advice('routes')}.")
        elif not report.streaming_routes:
            notes.append(f"Streams carry no routed experts: {advice('streaming_routes')}.")
        if report.logprobs and report.logprobs_mode == "unknown":
            notes.append(
                "The logprobs mode could not be told from the answers: declare logprobs_mode."
            )
        return notes


def _texts(models: list[ModelInfo]) -> dict[str, str]:
    """Of the base model, which comes first; a chat template from elsewhere is to be declared."""
    root = models[0].root
    return text_digests(root) if root is not None else {}


def _engine_name(models: list[ModelInfo], answer: Mapping[str, Any]) -> str:
    said = f"{models[0].owned_by or ''} {answer.get('system_fingerprint') or ''}".lower()
    return next((name for name in ("vllm", "sglang") if name in said), "unknown")
