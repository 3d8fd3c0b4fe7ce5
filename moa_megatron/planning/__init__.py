"""Which layout to train at: every legal one, whether it fits, how long it takes, in what order."""

from moa_megatron.planning.choosing import RECOMPUTE, Choice, choices, fits
from moa_megatron.planning.model import Cluster, Model, read
from moa_megatron.planning.policy import advice, recomputed, step_seconds

__all__ = [
    "RECOMPUTE",
    "Choice",
    "Cluster",
    "Model",
    "advice",
    "choices",
    "fits",
    "read",
    "recomputed",
    "step_seconds",
]
