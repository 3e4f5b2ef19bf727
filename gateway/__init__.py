"""The capture path: forwards an agent's calls to the engine and records what it sampled."""

from driftgate.gateway.app import create_app, run, serve
from driftgate.gateway.config import GatewayConfig
from driftgate.gateway.probe import ProbeReport, probe

__all__ = ["GatewayConfig", "ProbeReport", "create_app", "probe", "run", "serve"]
