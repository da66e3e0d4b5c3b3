"""An experiment: a task trained and evaluated as a configuration says."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jax.sharding import Mesh

from shardtrain.checkpoint import Checkpoints
from shardtrain.errors import UserError
from shardtrain.experiments.config import Config
from shardtrain.experiments.optimizers import OPTIMIZERS, make_optimizer
from shardtrain.experiments.task import Task
from shardtrain.guard import Guard
from shardtrain.guard.health import Row
from shardtrain.mesh import make_mesh, size
from shardtrain.plan import census
from shardtrain.train import Trainer
from shardtrain.train.batch import rows_of
from shardtrain.train.callbacks import Callback, Evaluation


@dataclass(frozen=True)
class Result:
    """What came of an experiment.

    Attributes:
        trainer: after the last step.
        rows: of the steps that this process made, see `Trainer.fit`.
        test: the loss and the metrics on the test batches.
        census: the collectives of the training step, see `shardtrain.census.summary`.
    """

    trainer: Trainer
    rows: list[Row]
    test: Mapping[str, Any]
    census: list[dict[str, Any]]

    @property
    def losses(self) -> list[float]:
        """The training loss of every step."""
        return [row["loss"] for row in self.rows]


def refuse_config(config: Config) -> None:
    """Refuses numbers and choices that are wrong for every task.

    Raises:
        UserError: names the field, and says what is possible.
    """
    choices = {
        "optimizer": OPTIMIZERS,
        "lr_schedule": ("cosine", "constant"),
        "on_nan": ("stop", "skip", "rollback"),
        "remat": ("none", "contractions", "nothing"),
    }
    for name, possible in choices.items():
        if (value := getattr(config, name)) not in possible:
            raise UserError(f"{name}={value!r}; there are {', '.join(possible)}")
    for name in ("steps", "batch_size"):
        if not isinstance(value := getattr(config, name), int) or value < 1:
            raise UserError(f"{name}={value!r}; give a whole number, 1 or more")
    if not isinstance(config.lr, int | float) or not 0 < config.lr < math.inf:
        raise UserError(f"lr={config.lr!r}; give a positive learning rate")


class Experiment:
    """A task and a configuration, ready to run; `run` is the short form.

    Args:
        task: what to train, and on what.
        config: numbers and choices.
        mesh: in place of the one that `config.mesh` names.

    Attributes:
        trainer: not trained yet.
        start: the step whose batch comes next.
        score: the metric that the run is judged by, once it is prepared.

    Raises:
        UserError: whatever the configuration can get wrong for this task.
    """

    def __init__(self, task: Task, config: Config, mesh: Mesh | None = None) -> None:
        refuse_config(config)
        if config.validate_every is not None and task.validation is None:
            raise UserError(
                f"validate_every={config.validate_every}: the task {task.name!r} has no validation batches; "
                f"give Task validation=, or leave validate_every out"
            )
        self.task, self.config = task, config
        self.mesh = make_mesh(config.mesh) if mesh is None else mesh
        staged = size(self.mesh, "pipe") > 1
        more = {name: value for name, value in task.trainer.items() if staged or name != "pipeline"}
        self.trainer = Trainer(
            task.model,
            make_optimizer(config),
            mesh=self.mesh,
            loss=task.loss,
            objective=task.objective,
            metrics=task.metrics,
            dimensions=task.dimensions,
            unit=task.unit,
            layout=task.layout,
            parameters=config.parameters if config.parameters in self.mesh.shape else (),
            accumulate=config.accumulate,
            dtype=None if config.dtype == "float32" else config.dtype,
            remat=None if config.remat == "none" else config.remat,
            clip_norm=config.clip_norm,
            skip_bad=config.on_nan == "skip",
            **more,
        )
        self.start = 0
        self._first: tuple[Any, Any] | None = None

    @property
    def rows_here(self) -> range:
        """The rows of each batch that this process brings."""
        return self.trainer.rows(self.config.batch_size)

    def prepare(self) -> None:
        """Compiles the step by the first batch: whatever does not fit is refused before any file is written.

        Raises:
            UserError: see `Trainer.prepare`.
        """
        self._feed = iter(self.task.train(start=self.start, rows=self.rows_here))
        if (first := next(self._feed, None)) is None:
            raise UserError(f"the task {self.task.name!r} has no training batches")
        if (rows := rows_of(first[0])) != len(self.rows_here):
            raise UserError(
                f"the task's batches have {rows} rows in this process, and "
                f"batch_size={self.config.batch_size} means {len(self.rows_here)}; give both one size"
            )
        self._first = first
        self.trainer.prepare(*first)
        self.score = self._score()

    def _score(self) -> str:
        names = self.trainer.measured
        if self.task.score not in (None, "loss", *names):
            raise UserError(
                f"the task {self.task.name!r} has score={self.task.score!r}; there are "
                f"{', '.join(('loss', *names))}"
            )
        return self.task.score or next(iter(names), "loss")

    def run(
        self,
        *,
        callbacks: Sequence[Callback] = (),
        checkpoints: Checkpoints | None = None,
        guard: Guard | None = None,
        progress: bool = False,
    ) -> Result:
        """Trains to the last step and evaluates on the test batches.

        Args:
            callbacks, checkpoints, guard, progress: see `Trainer.fit`.
        """
        if self._first is None:
            self.prepare()
        assert self._first is not None
        batches = itertools.chain([self._first], self._feed)
        rows = self.trainer.fit(
            batches,
            steps=self.config.steps,
            callbacks=[*self.validation(), *callbacks],
            checkpoints=checkpoints,
            guard=guard or Guard(watchdog=None, on_nan=self.config.on_nan),
            progress=progress,
        )
        test = self.trainer.evaluate(self.task.test(self.rows_here))
        moved = census.summary(census.census(self.trainer.compiled_text(), self.mesh))
        return Result(self.trainer, rows, test, moved)

    def validation(self) -> list[Callback]:
        """The callback that evaluates on the validation batches, if the configuration asks for it."""
        every, make = self.config.validate_every, self.task.validation
        if every is None or make is None:
            return []
        return [Evaluation(lambda: make(self.rows_here), every=every)]


def run(
    task: Task,
    config: Config,
    *,
    mesh: Mesh | None = None,
    callbacks: Sequence[Callback] = (),
    checkpoints: Checkpoints | None = None,
    guard: Guard | None = None,
) -> Result:
    """Trains and evaluates a task as a configuration says.

    Nothing is printed and no file is written, except by callbacks, checkpoints and a guard that are given.
    It can be called many times in one process.

    Args:
        task: what to train, and on what.
        config: numbers and choices.
        mesh: in place of the one that `config.mesh` names.
        callbacks, checkpoints, guard: see `Trainer.fit`.

    Raises:
        UserError: whatever the configuration can get wrong for this task; a bad step.

    Example:
        >>> from functools import partial
        >>> digits = st.data.load("digits")
        >>> task = st.experiments.Task(
        ...     name="lenet",
        ...     make=lambda: st.models.LeNet(10, (8, 8, 1), rngs=nnx.Rngs(0)),
        ...     train=partial(st.data.train_batches, digits.train, 64, seed=0),
        ...     test=lambda rows: st.data.eval_batches(digits.test, 64, rows=rows),
        ... )
        >>> config = st.experiments.Config(mesh="data=2", steps=2, batch_size=64)
        >>> result = st.experiments.run(task, config, mesh=st.make_mesh("data=2", devices=jax.devices()[:2]))
        >>> len(result.losses), sorted(result.test)
        (2, ['accuracy', 'loss'])
    """
    experiment = Experiment(task, config, mesh)
    return experiment.run(callbacks=callbacks, checkpoints=checkpoints, guard=guard)
