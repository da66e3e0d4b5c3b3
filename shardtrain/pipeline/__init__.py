"""Pipelines of stages: models cut into stages, and schedules as data."""

from shardtrain.pipeline.cut.split import Split, split
from shardtrain.pipeline.schedules.generate import NAMES, forward_only, make
from shardtrain.pipeline.schedules.schedule import Action, Schedule, validate
from shardtrain.pipeline.schedules.simulate import Costs, classical, fastest, lockstep

__all__ = [
    "NAMES",
    "Action",
    "Costs",
    "Schedule",
    "Split",
    "classical",
    "fastest",
    "forward_only",
    "lockstep",
    "make",
    "split",
    "validate",
]
