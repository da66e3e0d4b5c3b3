"""Training: state, step, loop, data, checkpoint, metrics."""

from shardtrain.train import data, losses, metrics, volumes
from shardtrain.train.guard import Guard
from shardtrain.train.state import TrainState
from shardtrain.train.trainer import Trainer

__all__ = ["Guard", "TrainState", "Trainer", "data", "losses", "metrics", "volumes"]
