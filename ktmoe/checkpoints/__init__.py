"""Checkpoints on disk: which files they are, and tensors under the names that they have in the model."""

from ktmoe.checkpoints.files import HUB, OPTIONS, find_files, refuse_adapter
from ktmoe.checkpoints.names import CheckpointNames, ExpertKey
from ktmoe.checkpoints.quantised import is_stored, refuse_quantised, stored_format
from ktmoe.checkpoints.reader import Checkpoint


__all__ = [
    "HUB",
    "OPTIONS",
    "Checkpoint",
    "CheckpointNames",
    "ExpertKey",
    "find_files",
    "is_stored",
    "refuse_adapter",
    "refuse_quantised",
    "stored_format",
]
