"""Pipelines of stages: their schedules as data."""

from shardtrain.pipeline.generate import NAMES, forward_only, make
from shardtrain.pipeline.schedule import Action, Schedule, validate
from shardtrain.pipeline.simulate import Costs, classical, fastest, lockstep

__all__ = [
    "NAMES",
    "Action",
    "Costs",
    "Schedule",
    "classical",
    "fastest",
    "forward_only",
    "lockstep",
    "make",
    "validate",
]
