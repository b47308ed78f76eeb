"""The versions that ktmoe is tested with: one list for `nox -s matrix`, `ktmoe doctor` and the documentation."""

from __future__ import annotations


# transformers and peft, oldest first: every model family was tried on each pair.
PAIRS = (
    ("4.40.2", "0.12.0"),
    ("4.51.3", "0.17.1"),
    ("4.57.6", "0.18.1"),
    ("4.57.6", "0.21.2"),
    ("5.2.0", "0.18.1"),
    ("5.5.4", "0.18.1"),
    ("5.5.4", "0.20.0"),
    ("5.23.0", "0.20.0"),
    ("5.23.0", "0.21.2"),
)
# The set that everything else is tested with (requirements/constraints.txt has all of it).
VERSIONS = {
    "torch": "2.13.0",
    "transformers": "5.5.4",
    "peft": "0.20.0",
    "kt-kernel": "0.7.2",
    "llamafactory": "0.9.5",
    "trl": "0.24.0",
}
