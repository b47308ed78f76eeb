"""Which checkpoint to go on from: a run that was killed while saving leaves a folder that is none."""

from __future__ import annotations

import json
import os
from pathlib import Path

from ktmoe.types import KTError


# The Trainer writes its state after the adapter, the optimizer and the random numbers: with it, all of them are there.
_LAST = "trainer_state.json"


def is_complete(folder: Path) -> bool:
    """Whether the Trainer finished writing a checkpoint."""
    try:
        return "global_step" in json.loads((folder / _LAST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


def last_complete(output_dir: str) -> tuple[str | None, list[str]]:
    """The newest complete checkpoint in a folder.

    Returns:
        Its path, None if there is none; and the names of the newer ones that are incomplete.
    """
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

    found = [p for p in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if p.name.rpartition("-")[2].isdigit()]
    skipped: list[str] = []
    for folder in sorted((p for p in found if p.is_dir()), key=lambda p: int(p.name.rpartition("-")[2]), reverse=True):
        if is_complete(folder):
            return str(folder), skipped
        skipped.append(folder.name)
    return None, skipped


def check_resume(value: str | bool | None, output_dir: str) -> None:
    """Refuses to go on from a checkpoint that is not there, or that was not written to its end.

    Args:
        value: `resume_from_checkpoint`: a folder, or true for the newest in `output_dir`.
        output_dir: of the run.

    Raises:
        KTError: before anything is loaded; says which checkpoint is complete.
    """
    if not value:
        return
    best = last_complete(output_dir)[0] if os.path.isdir(output_dir) else None
    if value is True and best is None:
        raise KTError(f"resume_from_checkpoint: got true; {output_dir} holds no complete checkpoint. Leave it out.")
    if value is not True and not is_complete(Path(value)):
        what = "was not written to its end" if os.path.isdir(value) else "is no folder"
        remedy = f"The newest complete one is {best}." if best else "Leave it out to start from the beginning."
        raise KTError(f"resume_from_checkpoint: {value} {what}. {remedy}")
