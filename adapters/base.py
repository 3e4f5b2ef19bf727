"""What the gateway needs to know about an engine: the names of its fields, and how it packs routes.

One file per engine implements this. An adapter holds facts about a foreign project and no state.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from driftgate.trace import LogprobsMode, Routes

__all__ = ["Ask", "EngineAdapter"]


class Ask(NamedTuple):
    """A request field that capture sets to true, and the keys of the answer that come by it."""

    field: str
    in_choice: tuple[str, ...] = ()
    in_top: tuple[str, ...] = ()


class EngineAdapter(Protocol):
    """Names and shapes of one engine's OpenAI API."""

    @property
    def name(self) -> str:
        """As in ``trace.Engine.name``."""

    @property
    def ask_ids(self) -> str:
        """Request field that, set to true, makes answers carry token ids."""

    @property
    def asks(self) -> tuple[Ask, ...]:
        """All that is asked for beside the log-probabilities, ``ask_ids`` first."""

    @property
    def streams_ids(self) -> bool:
        """Streams can carry token ids; else they are asked for as JSON and written here."""

    @property
    def omits_unasked(self) -> bool:
        """Keys that nobody asked for are absent from answers, not null."""

    @property
    def logprobs_mode(self) -> LogprobsMode:
        """What it returns by its documentation, where a probe cannot tell."""

    @property
    def weights_path(self) -> str | None:
        """Answers with JSON that holds ``weight_version``."""

    @property
    def info_paths(self) -> tuple[str, ...]:
        """Answer with the server's flags as JSON; the first one that is there counts."""

    @property
    def ask_stream_routes(self) -> str:
        """Request field that, set to true, makes our engine plugin send the routes chunk."""

    @property
    def routes_chunk_mark(self) -> str:
        """Top-level key that only the plugin's routes chunk has."""

    @property
    def render_path(self) -> str | None:
        """Answers a chat request with the ids of its prompt, as ``token_ids``; None: it has no such
        route, or its chat completions take no ids."""

    @property
    def prompt_ids_field(self) -> tuple[str, str]:
        """Field of a chat request and the key in it that take ids for the prompt, in place of
        rendering the messages."""

    @property
    def parses_alone(self) -> tuple[str, ...]:
        """Beginnings of versions whose answers in one piece are known to be parsed without a look
        at their prompt."""

    @property
    def refused_fields(self) -> dict[str, str]:
        """Request fields that an agent must not send (unless 0, false or null), and why."""

    def common(self, answer: bytes) -> bytes:
        """A JSON answer with ids, routes and weight spans under the names that are read here,
        which are vLLM's. One of ``UNREADABLE`` where it is none."""

    def decode_routes(self, encoded: bytes, *, prompt_len: int, response_len: int) -> Routes:
        """Routes [P + R - 1, L, K] of ``encoded``, the JSON string's content.

        ValueError, in words, where it is not such an array: nothing is padded or cut to fit.
        """

    def advice(self, what: str) -> str:
        """How to switch on ``ids``, ``logprobs``, ``routes`` or ``streaming_routes``."""
