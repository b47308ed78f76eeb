"""`python -m amx_emulation COMMAND...` runs a command on kt_kernel's AMX binary, emulated where the CPU has no AMX."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from amx_emulation import build


if why := build.missing():
    print(f"AMX NOT verified on this host: {why}")
    raise SystemExit(3)
with tempfile.TemporaryDirectory() as directory:
    library = build.library(Path(directory))
    raise SystemExit(subprocess.run(sys.argv[1:], env={**os.environ, **build.environment(library)}).returncode)
