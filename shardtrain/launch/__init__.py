"""Starts, connects, ends and restarts the processes of a job, here and on clusters."""

from shardtrain.launch.cluster import Cluster, detect, job, restarts
from shardtrain.launch.connect import Limits, connect

__all__ = ["Cluster", "Limits", "connect", "detect", "job", "restarts"]
