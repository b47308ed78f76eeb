"""From file to file: merged checkpoints, packed weights."""
