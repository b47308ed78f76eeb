"""How many tokens each expert had: a file that `ktmoe calibrate` writes and `kt_gpu_experts` names."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from ktmoe.errors import KTError


_KEY = "tokens_per_expert"


def check_place(path: str | os.PathLike[str]) -> None:
    """Refuses a file that could not be written, before minutes are spent on what goes into it.

    Raises:
        KTError: says what is in the way.
    """
    there = Path(path)
    if there.is_dir():
        raise KTError(f"--out: {there} is a folder; expected the file to write.")
    if not os.access(there.parent, os.W_OK) or not there.parent.is_dir():
        raise KTError(f"--out: {there} cannot be written: {there.parent} is no folder that can be written into.")


def write(path: str | os.PathLike[str], layers: Mapping[str, Sequence[int]], **about: object) -> None:
    """Writes counts.

    Args:
        path: of the file.
        layers: E counts for each layer, by the layer's name in the model.
        **about: where they come from, for people.
    """
    there = Path(path)
    draft = there.with_name(f"{there.name}.part")
    draft.write_text(json.dumps({**about, _KEY: {name: list(c) for name, c in layers.items()}}), encoding="utf-8")
    draft.replace(there)


def read(path: str | os.PathLike[str]) -> dict[str, list[int]]:
    """E counts for each layer, by name.

    Raises:
        KTError: no such file, or not one of these.
    """
    try:
        layers = json.loads(Path(path).read_text(encoding="utf-8"))[_KEY]
        found = {str(name): [int(count) for count in counts] for name, counts in layers.items()}
    except OSError as error:
        raise KTError(f"kt_gpu_experts: {path}: cannot be read ({error.strerror or error}).") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise KTError(
            f"kt_gpu_experts: {path}: not a file that ktmoe calibrate wrote (no counts under {_KEY!r})."
        ) from error
    if not found or any(not counts or min(counts) < 0 for counts in found.values()):
        raise KTError(f"kt_gpu_experts: {path}: holds no counts, or counts below 0. Write it again: ktmoe calibrate.")
    return found
