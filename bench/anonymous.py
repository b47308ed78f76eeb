"""Anonymous memory of a child process at its peak. Pages of mapped files do not count: they can be dropped."""

import subprocess
import sys
import time
from pathlib import Path


def now(pid):
    """Bytes that a process has; 0 when it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)


def peak(code, *arguments):
    """Bytes at the most, beyond what the process had when it said "ready" and waited for a line.

    Args:
        code: of the child, Python; it fails where it must.
        arguments: of the child.
    """
    command = [sys.executable, "-c", code, *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "ready\n"
        before = most = now(child.pid)
        child.stdin.write("\n")
        child.stdin.flush()
        while child.poll() is None:
            most = max(most, now(child.pid))
            time.sleep(0.002)
    assert child.returncode == 0
    return most - before
