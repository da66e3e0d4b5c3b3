"""Labelled images and volumes: reads them, and makes batches that depend on the seed and the step alone."""

from shardtrain.data import volumes
from shardtrain.data.images import (
    Arrays,
    Dataset,
    ImageBatch,
    eval_batches,
    hold_out,
    load,
    read_idx,
    train_batches,
)

__all__ = [
    "Arrays",
    "Dataset",
    "ImageBatch",
    "eval_batches",
    "hold_out",
    "load",
    "read_idx",
    "train_batches",
    "volumes",
]
