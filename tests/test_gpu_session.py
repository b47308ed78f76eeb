"""The session for a machine with a GPU, rehearsed on one without: every case runs, and gives what stock gives."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest


SCRIPT = Path(__file__).resolve().parent.parent / "bench" / "gpu_session.py"


@pytest.mark.slow  # in `nox -s training`
@pytest.mark.timeout(900)
def test_every_case_runs(tmp_path):
    told = "--device cpu --layers 2 --rows 2 --minutes 60 --folder".split()
    done = subprocess.run([sys.executable, SCRIPT, *told, tmp_path], capture_output=True, text=True, check=False)
    print(done.stdout, done.stderr)
    assert done.returncode == 0
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert len(rows) >= 12
    for row in rows:
        assert row["verdict"].startswith("ok"), row
        assert all(loss > 0 for loss in row["losses"])


def test_a_case_that_is_wrong_is_said(monkeypatch):
    spec = importlib.util.spec_from_file_location("gpu_session", SCRIPT)
    session = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_session", session)
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec.loader.exec_module(session)
    case, stock = session.Case("torch"), {"losses": [2.0, 1.0]}
    assert session.verdict(case, {"losses": [2.0, 1.01]}, stock).startswith("ok")
    assert session.verdict(case, {"losses": [2.0, 1.1]}, stock).startswith("FAILED: losses 10.0%")
    assert session.verdict(case, {"failed": "no memory"}, stock) == "FAILED: no memory"
    assert session.verdict(case, {"not_run": "trl not installed"}, stock) == "NOT RUN: trl not installed"
