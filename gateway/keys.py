"""Who may do what: three kinds of key, and keys that open one trajectory. Pure.

``call`` opens the model routes, ``read`` the stored traces, live drift and metrics, ``admin`` both
and whatever changes something (minting keys, rewards). A trajectory's key opens calls that belong
to it and reading of it alone; it cannot give itself a reward.

Nothing is asked for until one key is set; then everything but health and the dashboard's empty page
needs one, and what is not listed here needs ``admin``.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import ipaddress
import re
import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from driftgate.errors import AccessError

__all__ = [
    "KEY_PREFIX",
    "MIN_KEY_CHARS",
    "Access",
    "Keys",
    "TrajectoryKeys",
    "access_of",
    "credentials",
    "digest_of",
    "is_loopback",
    "minted_keys",
    "private_name",
]

Kind: TypeAlias = Literal["call", "read", "admin"]
Access: TypeAlias = Literal["open", "call", "read", "admin"]

KEY_PREFIX = "dgk_"
"""Of trajectories' keys, so that no other credential is taken for one."""

MIN_KEY_CHARS = 20
"""A digest in a configuration must not be worth guessing at: 20 characters of base64 are 120
bits."""

TAG_BYTES = 24
"""Of HMAC-SHA-256 in a trajectory's key: 192 bits, a multiple of 3 for base64."""

DIGEST = re.compile("sha256:[0-9a-f]{64}")

OPEN = frozenset({"/", "/healthz", "/readyz"})
"""Health, for those who balance load, and the dashboard's page, which holds no data."""

OPEN_BELOW = "/static"
"""The dashboard's scripts and styles."""


@dataclass(frozen=True, slots=True)
class _Grant:
    kinds: frozenset[Kind]
    trajectory: str | None = None
    """The only one that is open."""


class TrajectoryKeys:
    """Keys that name a trajectory and prove that this gateway, or one with its secret, made them.

    They are kept nowhere: with one secret for all gateways they hold across restarts and machines.
    """

    def __init__(self, secret: str | None = None) -> None:
        """Without ``secret`` the keys end with this object."""
        self._secret = secrets.token_bytes(32) if secret is None else secret.encode()

    def make(self, trajectory: str) -> str:
        """The key of ``trajectory``: always the same one."""
        name = trajectory.encode()
        return f"{KEY_PREFIX}{_encode(name)}.{_encode(self._tag(name))}"

    def trajectory_of(self, key: str) -> str | None:
        """The trajectory that ``key`` opens; None where it was not made with this secret."""
        encoded, _, _ = key.removeprefix(KEY_PREFIX).partition(".")
        try:
            name = base64.urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4)).decode()
        except ValueError:
            return None
        # Made anew, so that it has one spelling: base64 decoders skip what does not belong there.
        return name if hmac.compare_digest(_bytes(self.make(name)), _bytes(key)) else None

    def _tag(self, name: bytes) -> bytes:
        return hmac.digest(self._secret, b"driftgate trajectory\0" + name, "sha256")[:TAG_BYTES]


class Keys:
    """The keys of one gateway."""

    def __init__(
        self,
        *,
        call: Sequence[str] = (),
        read: Sequence[str] = (),
        admin: Sequence[str] = (),
        trajectories: TrajectoryKeys | None = None,
    ) -> None:
        """``call``, ``read``, ``admin``: digests as `digest_of` makes them."""
        self._digests: list[tuple[bytes, frozenset[Kind]]] = [
            *((bytes.fromhex(d[7:]), frozenset[Kind]({"call"})) for d in call),
            *((bytes.fromhex(d[7:]), frozenset[Kind]({"read"})) for d in read),
            *((bytes.fromhex(d[7:]), frozenset[Kind]({"call", "read", "admin"})) for d in admin),
        ]
        self.trajectories = trajectories or TrajectoryKeys()

    @property
    def required(self) -> bool:
        """Requests need a key."""
        return bool(self._digests)

    def check(
        self, access: Access, headers: Mapping[str, str], *, named: Collection[str] = ()
    ) -> None:
        """AccessError unless a key among ``headers`` gives ``access``.

        ``named``: the trajectories that the request names; ``headers`` must find names in any case.
        """
        if access == "open" or not self.required:
            return
        presented = credentials(headers)
        if not presented:
            raise AccessError(
                f"this needs a key for {_PURPOSE[access]}: send it as `Authorization: Bearer KEY`"
            )
        grants = [grant for key in presented if (grant := self._grant(key)) is not None]
        if not grants:
            raise AccessError("the key is not known here: use one that this gateway was given")
        if not any(_allows(grant, access, named) for grant in grants):
            own = next((g.trajectory for g in grants if g.trajectory is not None), None)
            whose = "" if own is None else f" of the trajectory {own!r}"
            raise AccessError(
                f"the key{whose} does not open this: it needs one for {_PURPOSE[access]}",
                status=403,
            )

    def _grant(self, key: str) -> _Grant | None:
        """What ``key`` opens. The time does not depend on which one it is, or how far it fits."""
        if key.startswith(KEY_PREFIX):
            trajectory = self.trajectories.trajectory_of(key)
            kinds = frozenset[Kind]({"call", "read"})
            return None if trajectory is None else _Grant(kinds, trajectory)
        digest = hashlib.sha256(_bytes(key)).digest()
        matches = [kinds for known, kinds in self._digests if hmac.compare_digest(digest, known)]
        return _Grant(frozenset[Kind]().union(*matches)) if matches else None


_PURPOSE: dict[Access, str] = {
    "open": "nothing",
    "call": "calling models",
    "read": "reading",
    "admin": "administration",
}


def _allows(grant: _Grant, access: Access, named: Collection[str]) -> bool:
    if access not in grant.kinds:
        return False
    if grant.trajectory is None:
        return True
    # A call that names none is the key's own; reading that names none is reading of all.
    return set(named) <= {grant.trajectory} and (access == "call" or bool(named))


def access_of(method: str, route: str) -> Access:
    """What a route asks for, by the pattern that it is mounted with, never by a request's path:
    that can be spelled in many ways."""
    if route in OPEN or route.startswith(OPEN_BELOW):
        return "open"
    if route.startswith(("/v1/", "/t/{trajectory}/v1/")):
        return "call"
    if method in ("GET", "HEAD") and (route == "/metrics" or route.startswith("/api/")):
        return "read"
    return "admin"


def digest_of(key: str) -> str:
    """``key`` as a configuration holds it. ValueError, without the key, where it is too short."""
    if len(key) < MIN_KEY_CHARS or key != key.strip() or not key.isascii() or "," in key:
        raise ValueError(
            f"a key has at least {MIN_KEY_CHARS} ASCII characters and neither commas nor spaces "
            "around it; `driftgate key` makes one"
        )
    return f"sha256:{hashlib.sha256(key.encode()).hexdigest()}"


def credentials(headers: Mapping[str, str]) -> list[str]:
    """The keys that a request carries: a bearer token, or Anthropic clients' ``x-api-key``."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    found = [token.strip()] if scheme.lower() == "bearer" else []
    found.append(headers.get("x-api-key", "").strip())
    return [key for key in found if key]


def minted_keys(headers: Mapping[str, str]) -> list[str]:
    """What a request carries as trajectories' keys, genuine or not."""
    return [key for key in credentials(headers) if key.startswith(KEY_PREFIX)]


def is_loopback(host: str) -> bool:
    """An address to listen on that only this machine reaches."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def private_name(host: str) -> bool:
    """A host that no stranger's name server can hand out: an address, a name without a dot, or one
    below the suffixes that are kept for local use (RFC 6761, RFC 6762, ICANN's ``internal``)."""
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        name = host.lower().rstrip(".")
        return "." not in name or name.endswith((".localhost", ".local", ".internal"))
    return True


def _bytes(text: str) -> bytes:
    return text.encode(errors="surrogateescape")  # as aiohttp read it


def _encode(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")
