"""Files of a run: checkpoints of its whole state, and the variables of its model for export."""

from shardtrain.checkpoint.checkpoints import Checkpoints
from shardtrain.checkpoint.export import export_state, import_state

__all__ = ["Checkpoints", "export_state", "import_state"]
