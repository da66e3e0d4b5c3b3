"""A task and a configuration make a result: what the command line and a search stand on."""

from shardtrain.experiments.config import Config
from shardtrain.experiments.experiment import Experiment, Result, run
from shardtrain.experiments.optimizers import OPTIMIZERS, make_optimizer
from shardtrain.experiments.task import Batches, Report, Task

__all__ = [
    "OPTIMIZERS",
    "Batches",
    "Config",
    "Experiment",
    "Report",
    "Result",
    "Task",
    "make_optimizer",
    "run",
]
