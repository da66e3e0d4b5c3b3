"""The names of `import shardtrain as st`; `shardtrain/__init__.py` imports them when the first is used."""

from shardtrain import data, experiments, launch, metrics, nn, ops, pipeline, plan
from shardtrain.checkpoint import Checkpoints, export_state, import_state
from shardtrain.data import volumes
from shardtrain.errors import UserError
from shardtrain.guard import Guard
from shardtrain.layout import Layout
from shardtrain.mesh import describe, make_mesh
from shardtrain.nn import models
from shardtrain.plan import census
from shardtrain.plan.summary import summary
from shardtrain.train import EMA, Extra, Pipeline, Trainer, TrainState, callbacks, losses

__all__ = [
    "EMA",
    "Checkpoints",
    "Extra",
    "Guard",
    "Layout",
    "Pipeline",
    "TrainState",
    "Trainer",
    "UserError",
    "callbacks",
    "census",
    "data",
    "describe",
    "experiments",
    "export_state",
    "import_state",
    "launch",
    "losses",
    "make_mesh",
    "metrics",
    "models",
    "nn",
    "ops",
    "pipeline",
    "plan",
    "summary",
    "volumes",
]
