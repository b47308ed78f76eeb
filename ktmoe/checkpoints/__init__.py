"""Checkpoints on disk: tensors under the names that they have in the model, block FP8 included."""

from ktmoe.checkpoints.names import CheckpointNames, ExpertKey
from ktmoe.checkpoints.reader import HUB, INDEX, Checkpoint


__all__ = ["HUB", "INDEX", "Checkpoint", "CheckpointNames", "ExpertKey"]
