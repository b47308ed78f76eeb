"""Checkpoints on disk: tensors under the model's names, FP8, packed weights."""
