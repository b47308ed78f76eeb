"""The table of backends: a row is all that a new one takes, and `auto` keeps why it passed others by."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import SMALL

from ktmoe import KTConfig, KTError
from ktmoe.backends import KERNEL_BACKENDS, TABLE
from ktmoe.planning import plan


def test_the_contract_suite_runs_on_a_new_row():
    """`toy_backend.py` declares a backend; nothing else knows of it."""
    suite = Path(__file__).with_name("test_contract.py")
    command = [
        sys.executable,
        "-m",
        "pytest",
        suite,
        "-p",
        "toy_backend",
        "-k",
        "dense",
        "-q",
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 25
    assert "dense" not in TABLE


def test_auto_takes_the_first_without_a_reason_and_keeps_the_reasons(monkeypatch):
    for number, name in enumerate(n for n in KERNEL_BACKENDS if not TABLE[n].stored):
        row = dataclasses.replace(TABLE[name], refuse_host=lambda n=number: f"reason {n}")
        monkeypatch.setitem(TABLE, name, row)
    decided = plan(KTConfig(), SMALL)
    assert decided.backend == "torch"
    assert decided.reasons == (("AMXBF16", "reason 0"),)
    assert decided.note == "reason 0"
    torch = dataclasses.replace(TABLE["torch"], refuse_shape=lambda shape: f"no K = {shape.top_k}")
    monkeypatch.setitem(TABLE, "torch", torch)
    decided = plan(KTConfig(), SMALL)
    assert decided.backend == "reference"
    assert decided.reasons == (("AMXBF16", "reason 0"), ("torch", "no K = 2"), ("AMXInt8", "reason 1"))


def test_auto_without_any_says_every_reason(monkeypatch):
    for name, row in TABLE.items():
        monkeypatch.setitem(TABLE, name, dataclasses.replace(row, refuse_shape=lambda shape: "too round"))
    with pytest.raises(KTError, match="auto found none: AMXBF16: too round; torch: too round"):
        plan(KTConfig(), SMALL)


def test_the_choices_of_the_configuration_are_the_rows(monkeypatch):
    monkeypatch.setitem(TABLE, "new", TABLE["torch"])
    assert KTConfig(kt_backend="NEW").kt_backend == "new"
