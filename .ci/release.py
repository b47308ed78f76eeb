"""What a release changes in the sources: the version, and the changelog's section of what is not released yet.

    python .ci/release.py FOLDER [VERSION]      # without one: the present version without its .dev

Prints the version. `python -m nox -s release` does so in a copy, builds it and looks at what came out.
"""

import argparse
import re
import sys
from datetime import datetime, timezone
from pathlib import Path

from packaging.version import InvalidVersion, Version


UNRELEASED = "## [Unreleased]\n"


def release(folder: Path, wanted: str | None, today: str) -> str:
    """Writes both files. Returns the version.

    Raises:
        ValueError: not a version that can follow, or nothing to release.
    """
    init, changelog = folder / "ktmoe" / "__init__.py", folder / "CHANGELOG.md"
    source, log = init.read_text(encoding="utf-8"), changelog.read_text(encoding="utf-8")
    (present,) = re.findall(r'^__version__ = "(.+)"$', source, re.MULTILINE)
    try:
        version = Version(wanted or Version(present).base_version)
    except InvalidVersion:
        raise ValueError(f"VERSION: got {wanted!r}, expected one as of PEP 440, such as 0.1.0 or 0.2.0rc1") from None
    if version.is_devrelease or version.local:
        raise ValueError(f"VERSION: got {version}, expected one that is neither of development nor local")
    before = [Version(found) for found in re.findall(r"^## \[(\d.*?)\]", log, re.MULTILINE)]
    newest = max([Version(present), *before])
    if version <= newest:
        raise ValueError(f"VERSION: got {version}, expected one after {newest}")
    _, found, rest = log.partition(UNRELEASED)
    if not found or not re.split(r"^## ", rest, flags=re.MULTILINE)[0].strip():
        raise ValueError("CHANGELOG.md: nothing is under [Unreleased]; say there what changed")
    init.write_text(source.replace(f'"{present}"', f'"{version}"'), encoding="utf-8")
    changelog.write_text(log.replace(UNRELEASED, f"{UNRELEASED}\n## [{version}] - {today}\n"), encoding="utf-8")
    return str(version)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("version", nargs="?")
    given = parser.parse_args()
    try:
        print(release(given.folder, given.version, f"{datetime.now(timezone.utc):%Y-%m-%d}"))
    except ValueError as error:
        sys.exit(str(error))
