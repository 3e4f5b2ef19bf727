"""Records what a rollout engine sampled, scores it with the trainer, and says where they differ."""

from driftgate.client import Client
from driftgate.errors import DriftgateError
from driftgate.mismatch import Bucket
from driftgate.trace import SCHEMA_VERSION, Engine, Score, ScoreMeta, Trace, TraceMeta, Trainer
from driftgate.views import DriftEvent, MismatchView

__all__ = [
    "SCHEMA_VERSION",
    "Bucket",
    "Client",
    "DriftEvent",
    "DriftgateError",
    "Engine",
    "MismatchView",
    "Score",
    "ScoreMeta",
    "Trace",
    "TraceMeta",
    "Trainer",
]
