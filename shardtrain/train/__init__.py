"""Training: state, step, loop, data, checkpoint, metrics."""

from shardtrain.train import data, losses, manifest, metrics, volumes
from shardtrain.train.checkpoint import Checkpoints
from shardtrain.train.guard import Guard
from shardtrain.train.state import TrainState
from shardtrain.train.trainer import Trainer

__all__ = [
    "Checkpoints",
    "Guard",
    "TrainState",
    "Trainer",
    "data",
    "losses",
    "manifest",
    "metrics",
    "volumes",
]
