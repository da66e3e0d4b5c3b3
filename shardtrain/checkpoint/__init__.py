"""What is on disk: checkpoints of whole runs, and models handed on as files."""

from shardtrain.checkpoint.checkpoints import Checkpoints
from shardtrain.checkpoint.export import export_state, import_state

__all__ = ["Checkpoints", "export_state", "import_state"]
