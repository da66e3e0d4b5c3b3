"""Optimizers by name, with rates that can be changed between steps."""

from typing import Any

import jax
import optax

from shardtrain.experiments.config import Config

OPTIMIZERS = ("sgd", "adam", "adamw", "lamb")


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """The optimizer that a configuration names, with its schedule.

    A constant learning rate, and the weight decay, are numbers in the optimizer's state
    (`optax.inject_hyperparams`): `Trainer.set_hyperparameters` changes them without compiling again.

    Example:
        >>> optimizer = st.experiments.make_optimizer(st.experiments.Config(optimizer="adamw", lr=1e-3))
    """
    warmup = max(1, config.steps // 10)
    rate: Any = config.lr
    if config.lr_schedule == "cosine":
        steps = max(config.steps, warmup + 1)
        rate = optax.warmup_cosine_decay_schedule(config.lr / 10, config.lr, warmup, steps)

    def kernels(params: dict[str, jax.Array]) -> dict[str, bool]:
        return {name: name.endswith("kernel") for name in params}

    def sgd(learning_rate: Any, weight_decay: Any) -> optax.GradientTransformation:
        decay = optax.add_decayed_weights(weight_decay, mask=kernels)
        return optax.chain(decay, optax.sgd(learning_rate, momentum=0.9))

    def adamw(learning_rate: Any, weight_decay: Any) -> optax.GradientTransformation:
        return optax.adamw(learning_rate, weight_decay=weight_decay, mask=kernels)

    def lamb(learning_rate: Any, weight_decay: Any) -> optax.GradientTransformation:
        return optax.lamb(learning_rate, weight_decay=weight_decay, mask=kernels)

    if config.optimizer == "adam":
        return optax.inject_hyperparams(optax.adam)(rate)
    make = {"sgd": sgd, "adamw": adamw, "lamb": lamb}[config.optimizer]
    return optax.inject_hyperparams(make)(learning_rate=rate, weight_decay=config.weight_decay)
