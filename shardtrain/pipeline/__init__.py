"""Pipelines of stages: models cut into stages, and schedules as data."""

from shardtrain.pipeline.generate import NAMES, forward_only, make
from shardtrain.pipeline.schedule import Action, Schedule, validate
from shardtrain.pipeline.simulate import Costs, classical, fastest, lockstep
from shardtrain.pipeline.split import Split, split

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
