"""How all tests are run, whatever folder they are in."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# A busy machine is no find: neither a slow example nor slowly made ones fail a property.
settings.register_profile(
    "busy", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("busy")
