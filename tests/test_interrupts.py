"""Ctrl-C, as a terminal sends it: to a command and all that it has started. It ends at once, says nothing of its own
insides, and leaves no process and nothing half-written."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from factory import save_model


@pytest.fixture(autouse=True)
def listening():
    """What a shell has started in the background ignores SIGINT, and so would all that it starts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("interrupts")
    save_model(folder / "model")
    (folder / "rows.txt").write_text("\n".join(f"a line of text {i}" for i in range(200_000)))
    config = {
        "model_name_or_path": str(folder / "model"), "stage": "sft", "do_train": True, "finetuning_type": "lora",
        "dataset": "identity", "template": "default", "cutoff_len": 64, "output_dir": str(folder / "out"),
        "per_device_train_batch_size": 1, "num_train_epochs": 1000, "bf16": False, "use_cpu": True,
        "logging_steps": 1, "report_to": "none", "save_strategy": "no", "use_kt": True, "kt_backend": "torch",
    }  # fmt: skip
    (folder / "train.yaml").write_text(yaml.safe_dump(config))
    return folder


def living(session):
    """Processes of a session, without those that have ended and wait for their parent."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, its = stat.read_text().rpartition(")")[2].split()[:4]
        except OSError:  # it has just ended
            continue
        if int(its) == session and state != "Z":
            found.append(stat.parent.name)
    return found


def of(temporary):
    """Processes that have this folder for temporary files, in whatever session."""
    found = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"TMPDIR={temporary}".encode() in environ.read_bytes():
                found.append(environ.parent.name)
        except OSError:
            continue
    return found


def interrupted(folder, arguments, begun, temporary):
    """Runs a command until it prints a text, then sends SIGINT. Its exit code, seconds to the end, and output."""
    temporary.mkdir(exist_ok=True)
    log = temporary.parent / "log"
    with log.open("w") as stream:
        child = subprocess.Popen(
            [sys.executable, "-m", "ktmoe.cli", *arguments],
            stdout=stream, stderr=stream, stdin=subprocess.DEVNULL, cwd=folder, start_new_session=True,
            env=os.environ | {"TMPDIR": str(temporary), "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
    try:
        end = time.monotonic() + 90
        while begun not in log.read_text():
            assert child.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.05)
        time.sleep(0.5)
        assert child.poll() is None, log.read_text()
        os.killpg(child.pid, signal.SIGINT)
        start = time.monotonic()
        code = child.wait(30)
        seconds = time.monotonic() - start
        while living(child.pid) or of(temporary):  # what is killed takes a moment
            assert time.monotonic() < start + 10, (living(child.pid), of(temporary))
            time.sleep(0.05)
    finally:
        for process in {*living(child.pid), *of(temporary)}:
            os.kill(int(process), signal.SIGKILL)
    return code, seconds, log.read_text()


@pytest.mark.parametrize(
    ("arguments", "begun"),
    [
        ("train train.yaml", "'loss'"),
        ("calibrate model rows.txt --out counts.json", "Counting"),
        ("verify --output report", " accuracy "),
    ],
    ids=["train", "calibrate", "verify"],
)
def test_ctrl_c_ends_a_command(folder, tmp_path, arguments, begun):
    before = set(os.listdir(folder))
    code, seconds, said = interrupted(folder, arguments.split(), begun, tmp_path / "tmp")
    assert code == 130
    assert seconds < 20
    assert "Traceback" not in said
    assert not list((tmp_path / "tmp").iterdir())
    new = set(os.listdir(folder)) - before
    assert new <= {"out", "report"}, new
    assert not list((folder / "report").glob("report.*"))
