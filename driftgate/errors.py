"""The errors driftgate raises on purpose, one class per boundary.

    DriftgateError            500
    ├── RequestError          400   the agent's or the caller's request is wrong
    ├── AccessError           401   no key, or an unknown one; 403: it does not open this
    ├── NotFoundError         404   no such trajectory, step, trace or route
    ├── UpstreamError         502   the engine refused, died or answered nonsense; 429: it is paused
    ├── StorageError          503   the store cannot take or give a record now
    │   └── FormatError       500   bytes on disk are not what FORMAT.md says
    └── TeacherError          500   the trainer cannot score these traces

A message names the value, the limit and the fix. What the user got wrong in plain Python calls is a
``ValueError``; what we got wrong is an ``assert``.
"""

import msgspec

__all__ = [
    "UNREADABLE",
    "AccessError",
    "DriftgateError",
    "FormatError",
    "NotFoundError",
    "RequestError",
    "StorageError",
    "TeacherError",
    "UpstreamError",
]


UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What a JSON decoder raises for anybody's bytes: bad JSON or wrong types, text that is not UTF-8,
and arrays nested too deep. msgspec says each in its own way."""


class DriftgateError(Exception):
    """Base of every error that driftgate raises on purpose; ``status`` is its HTTP status."""

    status = 500


class RequestError(DriftgateError):
    """The caller sent something that cannot be served as it is."""

    status = 400


class AccessError(DriftgateError):
    """The caller may not do this: no key or an unknown one (401), or the wrong one (403)."""

    status = 401

    def __init__(self, message: str, *, status: int = 401) -> None:
        super().__init__(message)
        self.status = status


class NotFoundError(DriftgateError):
    """The named thing does not exist (or not yet)."""

    status = 404


class UpstreamError(DriftgateError):
    """The engine could not be reached or did not answer as an engine does (502), or a trainer has
    paused it (429)."""

    status = 502

    def __init__(self, message: str, *, status: int = 502) -> None:
        super().__init__(message)
        self.status = status


class StorageError(DriftgateError):
    """The store cannot take or give a record now."""

    status = 503


class FormatError(StorageError):
    """Bytes on disk do not follow FORMAT.md."""

    status = 500


class TeacherError(DriftgateError):
    """The trainer cannot score these traces."""
