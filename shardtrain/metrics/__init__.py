"""Metrics as sums and a finish: one value for a data set, whatever it was split over.

`Metric` is the protocol that the trainer knows, `per_example` makes one of a function; the others are
shipped.
"""

from shardtrain.metrics.base import Metric, PerExample, accumulate, as_metric, finished, per_example
from shardtrain.metrics.calibration import expected_calibration_error
from shardtrain.metrics.classification import accuracy, confusion_matrix, f1, precision, recall, top_k
from shardtrain.metrics.language import perplexity
from shardtrain.metrics.ranking import auc, auc_error_bound
from shardtrain.metrics.regression import mean_absolute_error, mean_squared_error
from shardtrain.metrics.segmentation import iou

__all__ = [
    "Metric",
    "PerExample",
    "accumulate",
    "accuracy",
    "as_metric",
    "auc",
    "auc_error_bound",
    "confusion_matrix",
    "expected_calibration_error",
    "f1",
    "finished",
    "iou",
    "mean_absolute_error",
    "mean_squared_error",
    "per_example",
    "perplexity",
    "precision",
    "recall",
    "top_k",
]
