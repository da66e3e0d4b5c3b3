"""Recipes on the command line: their flags and checks, and a run from its first step to its files."""

from shardtrain import interrupts

interrupts.without_traceback()
with interrupts.at_once():  # importing the rest takes seconds
    from shardtrain.cli.flags import Folder, RunFlags, at_least_1, one_of
    from shardtrain.cli.pictures import picture
    from shardtrain.cli.pipeline import draw
    from shardtrain.cli.run import kinds, make_trainer, run, with_validation
    from shardtrain.cli.start import main
    from shardtrain.experiments import Report, Task

__all__ = [
    "Folder",
    "Report",
    "RunFlags",
    "Task",
    "at_least_1",
    "draw",
    "kinds",
    "main",
    "make_trainer",
    "one_of",
    "picture",
    "run",
    "with_validation",
]
