"""What comes with ktmoe, for a first run in an empty folder: example configurations, and data sets for them."""

from __future__ import annotations

import json
from pathlib import Path


DATA = Path(__file__).with_name("own_data")
# In a wheel they are beside this file; an editable installation has them where they are written.
_EXAMPLES = (Path(__file__).with_name("examples"), Path(__file__).parents[2] / "examples")


def example(path: str) -> Path | None:
    """The example configuration that `path` names as the README does, where there is no such file.

    Args:
        path: as the user wrote it.
    """
    asked = Path(path)
    if asked.exists() or asked.parent.name not in ("", "examples"):
        return None
    return next((f for folder in _EXAMPLES if (f := folder / asked.name).is_file()), None)


def datasets() -> list[str]:
    """Names of the data sets in `DATA`."""
    return list(json.loads((DATA / "dataset_info.json").read_text(encoding="utf-8")))
