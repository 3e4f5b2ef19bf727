"""``driftgate key``: a key for the gateway, and the digest that its configuration holds."""

from __future__ import annotations

import secrets

__all__ = ["key"]

KEY_BYTES = 32
"""256 random bits: nobody guesses it from its digest."""


def key() -> None:
    """Make a key for calling, reading or administering a gateway.

    Give the key to those who use it and its digest to the gateway (call_keys, read_keys or
    admin_keys in the file of `driftgate serve --config`). It is shown once and kept nowhere.
    """
    from driftgate.gateway.keys import digest_of

    made = secrets.token_urlsafe(KEY_BYTES)
    print(f"key:    {made}\ndigest: {digest_of(made)}")
