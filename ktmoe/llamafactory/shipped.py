"""What comes with ktmoe, for a first run in an empty folder: example configurations and scripts, and data sets."""

from __future__ import annotations

import difflib
import json
from pathlib import Path

from ktmoe.types import KTError


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
    return examples().get(asked.stem) if asked.suffix == ".yaml" else None


def examples() -> dict[str, Path]:
    """The examples by name: configurations without their `.yaml`, then scripts."""
    folder = next(f for f in _EXAMPLES if f.is_dir())
    scripts = {path.name: path for path in sorted(folder.glob("*.py"))}
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))} | scripts


def write_example(name: str) -> Path:
    """Copies an example into the current folder.

    Args:
        name: one of `examples`, with or without `.yaml` or `.py`.

    Raises:
        KTError: there is no such example, or there is a file of that name already.
    """
    known = examples()
    source = known.get(name.removesuffix(".yaml")) or known.get(f"{name}.py")
    if source is None:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.3)
        raise KTError(f"NAME: got {name!r}; expected one of {', '.join(near or known)}.")
    out = Path(source.name)
    try:
        with out.open("x", encoding="utf-8") as file:  # never over what is there
            file.write(source.read_text(encoding="utf-8"))
    except FileExistsError:
        raise KTError(f"{out}: is there already. Move it away, or run this in another folder.") from None
    except OSError as error:
        raise KTError(f"{out}: cannot be written ({error.strerror}).") from error
    return out


def datasets() -> list[str]:
    """Names of the data sets in `DATA`."""
    return list(json.loads((DATA / "dataset_info.json").read_text(encoding="utf-8")))
