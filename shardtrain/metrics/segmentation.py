"""Metrics of class scores against labels of pixels."""

from shardtrain.metrics.base import Metric
from shardtrain.metrics.classification import by_class


def iou(classes: int, ignore_label: int | None = None, average: str | None = "macro") -> Metric:
    """Intersection over union of labels and predictions, over all pixels of the data: TP / (TP + FP + FN).

    Scores have shape `(batch, *spatial, classes)`, labels `(batch, *spatial)`. It is no mean over images: the
    pixels of all images are counted together.

    Args:
        classes: the number of classes.
        ignore_label: pixels with this label count nowhere, whatever was predicted there. Where it is itself
            the number of a class, that class is left out of the mean.
        average: `"macro"` for the mean over classes, None for an array with the value of each class, which
            only `evaluate` computes. A class that is neither a label nor a prediction anywhere in the data
            is left out of the mean, as `sklearn.metrics.jaccard_score` does where it is given no list of
            labels, and is NaN in the array.

    Raises:
        UserError: no class, or another average; by `sums`, scores of another number of classes.

    Example:
        >>> metric = st.metrics.iou(3, ignore_label=255)
        >>> logits = jnp.eye(3)[jnp.array([[0, 1, 1, 0]])]
        >>> labels = jnp.array([[0, 1, 0, 255]])
        >>> metric.finish(metric.sums(logits, labels, jnp.ones(1)))  # 1/2 and 1/2; class 2 is nowhere
        0.5

    References:
        Jaccard, The Distribution of the Flora in the Alpine Zone, 1912.
    """
    return by_class(
        lambda both, labelled, predicted: (both, labelled + predicted - both),
        classes,
        average,
        averages=("macro",),
        ignore_label=ignore_label,
    )
