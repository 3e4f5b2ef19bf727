"""What the gateway needs to know about an engine: the names of its fields, and how it packs routes.

One file per engine implements this. An adapter holds facts about a foreign project and no state.
"""

from __future__ import annotations

from typing import Protocol

from driftgate.trace import Routes

__all__ = ["EngineAdapter"]


class EngineAdapter(Protocol):
    """Names and shapes of one engine's OpenAI API."""

    @property
    def name(self) -> str:
        """As in ``trace.Engine.name``."""

    @property
    def ask_ids(self) -> str:
        """Request field that, set to true, makes answers carry token ids."""

    @property
    def ask_stream_routes(self) -> str:
        """Request field that, set to true, makes our engine plugin send the routes chunk."""

    @property
    def routes_chunk_mark(self) -> str:
        """Top-level key that only the plugin's routes chunk has."""

    @property
    def refused_fields(self) -> dict[str, str]:
        """Request fields that an agent must not send (unless 0, false or null), and why."""

    def decode_routes(self, encoded: bytes, *, prompt_len: int, response_len: int) -> Routes:
        """Routes [P + R - 1, L, K] of ``encoded``, the JSON string's content.

        ValueError, in words, where it is not such an array: nothing is padded or cut to fit.
        """

    def advice(self, what: str) -> str:
        """How to switch on ``ids``, ``logprobs``, ``routes`` or ``streaming_routes``."""
