"""Training: state, step, loop, data, checkpoint, metrics."""

from shardtrain.train import data, losses, metrics, volumes
from shardtrain.train.state import TrainState
from shardtrain.train.trainer import Trainer

__all__ = ["TrainState", "Trainer", "data", "losses", "metrics", "volumes"]
