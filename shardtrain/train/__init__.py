"""Training: batches, objective, state, step, loop and callbacks."""

from shardtrain.train import callbacks, losses
from shardtrain.train.extra import EMA, Extra
from shardtrain.train.pipelined.plan import Pipeline
from shardtrain.train.state import TrainState
from shardtrain.train.trainer import Trainer

__all__ = ["EMA", "Extra", "Pipeline", "TrainState", "Trainer", "callbacks", "losses"]
