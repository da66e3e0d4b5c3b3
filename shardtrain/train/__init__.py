"""Training: batches, objective, state, step, loop and reports."""

from shardtrain.train import losses
from shardtrain.train.state import TrainState
from shardtrain.train.trainer import Trainer

__all__ = ["TrainState", "Trainer", "losses"]
