"""The numbers and choices of an experiment."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Config:
    """The numbers and choices of an experiment; recipes have each as a flag.

    `seed` and `batch_size` are also for whoever makes the task, whose functions make initial values and
    batches.

    Example:
        >>> config = st.experiments.Config(mesh="data=2,height=2", steps=20, lr=0.05)
    """

    mesh: str = "data=-1"
    """Axes and sizes: data cuts the batch, height and width the pixels, channel the features; pipe the
    layers, into stages. One size may be -1 and takes the devices that are left."""
    steps: int = 200
    """Updates in all."""
    batch_size: int = 128
    """Examples for one update, over all devices."""
    seed: int = 0
    """Of initial weights, data order and dropout."""
    optimizer: str = "sgd"
    """sgd (momentum 0.9), adam, adamw, lamb."""
    lr: float = 0.1
    """Peak learning rate."""
    lr_schedule: Literal["cosine", "constant"] = "cosine"
    """cosine: warm-up over the first tenth of the steps, then down to zero; constant: for runs that are later
    resumed with more --steps."""
    weight_decay: float = 5e-4
    """Decay of kernels, not of biases and norms; decoupled for adamw and lamb, in the gradient for sgd."""
    clip_norm: float | None = None
    """Clip gradients to this global norm."""
    accumulate: int = 1
    """Microbatches for one update."""
    parameters: str = ""
    """Mesh axis to spread parameters and optimizer state over, such as data (ZeRO-3, FSDP)."""
    remat: Literal["none", "contractions", "nothing"] = "none"
    """What the backward pass keeps: everything, only outputs of convolutions and linear maps, or nothing."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Compute in it; parameters and optimizer stay in float32."""
    on_nan: Literal["stop", "skip", "rollback"] = "stop"
    """When a loss or a gradient is not finite: stop, skip the update, or roll back to the last checkpoint and
    go on behind that batch."""
    validate_every: int | None = None
    """Steps from one evaluation on validation examples to the next; they are held out of the training set."""
