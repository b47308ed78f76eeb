"""One probe for each of the kernel's traps (docs/kernel.md): small runs that are wrong or crash without ktmoe's guard.

A probe takes the name of a kernel backend and returns what it found wrong, as sentences. `ktmoe.verify.traps` runs
them in a process of their own; tests/test_guards.py takes each guard away and expects its probe to notice.
"""

from ktmoe.verify.probes import calls, formats, layers, order
from ktmoe.verify.probes.trap import TRAPS


__all__ = ["TRAPS", "calls", "formats", "layers", "order"]
