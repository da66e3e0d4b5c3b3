"""Watches over the processes of a run: hangs, signals, bad steps, lost processes."""

from shardtrain.guard.guard import Guard

__all__ = ["Guard"]
