"""Ctrl-C, as a terminal sends it: to a command and all that it has started. It ends at once, says nothing of its own
insides, and leaves no process and nothing half-written."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import yaml
from factory import save_model
from helpers import free_port, run_python


@pytest.fixture(autouse=True)
def listening():
    """What a shell starts in the background ignores SIGINT, what nohup starts SIGHUP; so would all that they start."""
    wanted = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in wanted.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


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


def left(temporary):
    """Processes with this folder for temporary files: all that a command has started, in whatever session."""
    found = psutil.process_iter(["environ"])
    return [p for p in found if (p.info["environ"] or {}).get("TMPDIR", "").startswith(str(temporary))]


def interrupted(folder, arguments, begun, temporary, number=signal.SIGINT, after=0.5, **environment):
    """Runs a command until it prints a text, then sends a signal. Its exit code, seconds to the end, and output."""
    temporary.mkdir(exist_ok=True)
    log = temporary.parent / "log"
    with log.open("w") as stream:
        child = subprocess.Popen(
            [sys.executable, "-m", "ktmoe.cli", *arguments],
            stdout=stream, stderr=stream, stdin=subprocess.DEVNULL, cwd=folder, start_new_session=True,
            env=os.environ | {"TMPDIR": str(temporary), "PYTHONUNBUFFERED": "1"} | environment,
        )  # fmt: skip
    try:
        end = time.monotonic() + 90
        while begun not in log.read_text():
            assert child.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.05)
        time.sleep(after)
        assert child.poll() is None, log.read_text()
        os.killpg(child.pid, number)
        start = time.monotonic()
        code = child.wait(30)
        seconds = time.monotonic() - start
        while here := left(temporary):  # what is killed takes a moment
            assert time.monotonic() < start + 20, here
            time.sleep(0.05)
    finally:
        for process in left(temporary):
            process.kill()
    return code, seconds, log.read_text()


@pytest.mark.parametrize(
    ("arguments", "begun", "after"),
    [
        ("train train.yaml", "'loss'", 0.5),
        ("calibrate model rows.txt --out counts.json", "Counting", 0.5),
        (
            "verify --output report",
            " accuracy ",
            2.0,
        ),  # a section imports torch by then, as for most of its first seconds
    ],
    ids=["train", "calibrate", "verify"],
)
def test_ctrl_c_ends_a_command(folder, tmp_path, arguments, begun, after):
    before = set(os.listdir(folder))
    code, seconds, said = interrupted(folder, arguments.split(), begun, tmp_path / "tmp", after=after)
    assert code == 130
    assert seconds < 20
    assert "Traceback" not in said, said
    assert not list((tmp_path / "tmp").iterdir())
    new = set(os.listdir(folder)) - before
    assert new <= {"out", "report"}, new
    assert not list((folder / "report").glob("report.*"))


def test_ctrl_c_ends_a_training_of_several_processes(folder, tmp_path):
    several = {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "2", "MASTER_PORT": str(free_port())}
    code, seconds, said = interrupted(folder, ["train", "train.yaml"], "'loss'", tmp_path / "tmp", **several)
    assert code == 130
    assert seconds < 20
    assert "Traceback" not in said, said


def test_what_torchrun_passes_on_does_not_interrupt_a_second_time():
    """The terminal has sent it already, and what runs by then ends the training."""
    done = run_python("""
        import os, signal
        from ktmoe.llamafactory import worker

        signal.signal(signal.SIGINT, worker._interrupted)
        for _ in range(2):
            try:
                os.kill(os.getpid(), signal.SIGINT)
                print("not interrupted")
            except KeyboardInterrupt:
                print("interrupted")
    """)
    assert done.stdout.split("\n") == ["interrupted", "not interrupted", ""], done.stderr


def test_a_closed_terminal_leaves_no_section_of_a_verification(folder, tmp_path):
    """Which may take hours: what `verify` starts stays within reach of whatever ends it."""
    code, *_ = interrupted(folder, ["verify"], " accuracy ", tmp_path / "tmp", signal.SIGHUP)
    assert code == -signal.SIGHUP
