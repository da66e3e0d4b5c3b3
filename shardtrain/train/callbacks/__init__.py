"""Callbacks: what a run does besides its steps, each at a cadence of its own."""

from shardtrain.train.callbacks.base import Callback, Run
from shardtrain.train.callbacks.evaluation import BestCheckpoint, EarlyStopping, Evaluation
from shardtrain.train.callbacks.files import JsonLines
from shardtrain.train.callbacks.services import MLflow, WandB
from shardtrain.train.callbacks.tensorboard import TensorBoard
from shardtrain.train.callbacks.terminal import Terminal

__all__ = [
    "BestCheckpoint",
    "Callback",
    "EarlyStopping",
    "Evaluation",
    "JsonLines",
    "MLflow",
    "Run",
    "TensorBoard",
    "Terminal",
    "WandB",
]
