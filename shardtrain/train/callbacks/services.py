"""Rows of a run to the services that teams compare runs in, where their packages are installed."""

import importlib
from collections.abc import Mapping
from typing import Any

from shardtrain.errors import UserError
from shardtrain.guard.health import Row
from shardtrain.train.callbacks.base import Callback, Run, refuse_cadence
from shardtrain.train.callbacks.files import numbers


def package(name: str, service: str) -> Any:
    """Imports a package that a service needs.

    Raises:
        UserError: it is not installed; says what to type.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"{service} needs the package {name}; type `pip install {name}`") from error


class MLflow(Callback):
    """Logs the numbers of the rows to an MLflow run, which it starts and ends.

    Args:
        experiment: the experiment's name.
        uri: the tracking server or folder; MLflow's own setting by default.
        parameters: what is logged once, such as a recipe's flags.
        every: steps from one logged row to the next.

    Raises:
        UserError: the package mlflow is not installed, at construction.
    """

    def __init__(
        self,
        experiment: str,
        *,
        uri: str | None = None,
        parameters: Mapping[str, Any] | None = None,
        every: int = 1,
    ) -> None:
        refuse_cadence("MLflow", every)
        self._mlflow = package("mlflow", "MLflow")
        self.experiment, self.uri, self.parameters, self.every = experiment, uri, parameters or {}, every

    def on_start(self, run: Run) -> None:
        if self.uri is not None:
            self._mlflow.set_tracking_uri(self.uri)
        self._mlflow.set_experiment(self.experiment)
        self._mlflow.start_run()
        self._mlflow.log_params(dict(self.parameters))

    def on_step(self, run: Run, row: Row) -> None:
        self._mlflow.log_metrics(numbers(row), step=run.step)

    def on_end(self, run: Run) -> None:
        self._mlflow.end_run("FINISHED" if run.error is None else "FAILED")


class WandB(Callback):
    """Logs the numbers of the rows to a Weights & Biases run, which it starts and ends.

    Args:
        project: the project's name.
        config: what is logged once, such as a recipe's flags.
        every: steps from one logged row to the next.
        options: more arguments of `wandb.init`, such as `mode="offline"` or `dir=...`.

    Raises:
        UserError: the package wandb is not installed, at construction.
    """

    def __init__(
        self, project: str, *, config: Mapping[str, Any] | None = None, every: int = 1, **options: Any
    ) -> None:
        refuse_cadence("WandB", every)
        self._wandb = package("wandb", "Weights & Biases")
        self.project, self.config, self.every, self.options = project, dict(config or {}), every, options
        self._run: Any = None

    def on_start(self, run: Run) -> None:
        self._run = self._wandb.init(project=self.project, config=self.config, **self.options)

    def on_step(self, run: Run, row: Row) -> None:
        self._run.log(numbers(row), step=run.step)

    def on_end(self, run: Run) -> None:
        if self._run is not None:
            self._run.finish(exit_code=0 if run.error is None else 1)
