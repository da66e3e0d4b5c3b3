"""What surrounds the processes of a job: finding each other, starting, ending and starting again."""

from shardtrain.launch.cluster import Cluster, detect, job, restarts
from shardtrain.launch.connect import Limits, connect

__all__ = ["Cluster", "Limits", "connect", "detect", "job", "restarts"]
