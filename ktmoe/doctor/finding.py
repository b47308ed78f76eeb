"""What a check has found."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import Enum


class Status(str, Enum):
    """How a finding counts: only a problem changes the exit code."""

    OK = "ok"
    NOTE = "note"  # it works, but slower or with less than there could be
    PROBLEM = "problem"


@dataclass(frozen=True)
class Finding:
    """One line of the table.

    Attributes:
        name: what was looked at.
        what: what is there, in a few words.
        status: how it counts.
        remedy: a command to paste, or what to change; "" where nothing can or need be done.
    """

    name: str
    what: str
    status: Status = Status.OK
    remedy: str = ""

    def as_json(self) -> dict[str, str]:
        """Plain texts."""
        return asdict(self) | {"status": self.status.value}
