"""What held when a run began and does not any more is said once: cores, threads, quotas."""

import os
import subprocess
import sys
import textwrap
import time
from contextlib import suppress
from pathlib import Path

import pytest
from helpers import KERNELS, run_python

from ktmoe import drift
from ktmoe.cores import periods


@pytest.fixture
def watch(tmp_path, monkeypatch, recwarn):
    """Looks at every call, into a drawn `/proc` and `/sys`."""
    monkeypatch.setattr("ktmoe.notices._said", set())
    monkeypatch.setattr("ktmoe.backends.kt.extension.Host._hosts", {})  # the drawn CPUs are not for real threads
    monkeypatch.setattr(drift, "_EVERY", 0.0)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/job\n")
    (tmp_path / "sys/fs/cgroup/job").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/job/cpu.max").write_text("150000 100000\n")
    found = drift.Watch(tmp_path)

    def look(stopped=0, of=100):
        stat = tmp_path / "sys/fs/cgroup/job/cpu.stat"
        before = periods(tmp_path) or [(0, 0)]
        stat.write_text(f"usage_usec 1\nnr_periods {before[0][0] + of}\nnr_throttled {before[0][1] + stopped}\n")
        found.look()
        return [str(w.message) for w in recwarn if str(w.message).startswith("ktmoe")]

    return look


def test_a_quota_that_stops_the_process_is_said_once(watch):
    assert watch() == []
    assert watch(stopped=5) == []  # now and then is no matter
    (said,) = watch(stopped=60)
    assert "quota of 1.5 CPUs" in said
    assert "in 60% of its time slices" in said
    assert "OMP_NUM_THREADS=1" in said
    assert watch(stopped=70) == [said]  # whatever the figure


def test_cores_that_are_taken_away_are_said(watch, monkeypatch):
    monkeypatch.setattr(drift, "_cpus", lambda: {0, 1, 2, 3, 5, 8})
    watch()
    monkeypatch.setattr(drift, "_cpus", lambda: {0, 1, 2, 5})
    (said,) = watch()
    assert "CPUs 3,8 were taken from this process, which has 0-2,5 now" in said
    monkeypatch.setattr(drift, "_cpus", lambda: {0, 1, 2, 3, 5})  # one comes back
    assert watch() == [said]


def test_it_does_not_look_at_every_call(monkeypatch):
    looked = []
    monkeypatch.setattr(drift, "_cpus", lambda: looked.append(1) or set())
    watch = drift.Watch()
    for _ in range(100):
        watch.look()
    assert len(looked) == 1


@pytest.mark.kernel
@pytest.mark.parametrize("name", KERNELS[:1])
def test_a_thread_that_was_moved_is_put_back(name):
    """As `taskset -a -p` does it to a process that runs."""
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) < 2:
        pytest.skip("one core: there is nowhere to move a thread")
    done = run_python(f"""
        import os, warnings, helpers
        from ktmoe import drift
        from ktmoe.backends.kt.extension import Host
        case = helpers.draw({name!r}, helpers.SMALL, 8)
        config = helpers.KTConfig(kt_backend={name!r}, kt_num_threads=2)
        backend = helpers.build(helpers.plan(config, helpers.SMALL), case.weights, helpers.SMALL, 1.0)
        helpers.contract.answer(backend, case)
        drift._EVERY, watch = 0.0, drift.Watch()
        watch.look()
        (thread, *_) = Host._own()[0]._workers
        os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])  # as OMP_PROC_BIND does to the main thread
        own = os.sched_getaffinity(thread)
        os.sched_setaffinity(thread, set({allowed}) - own)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            watch.look()
        assert os.sched_getaffinity(thread) == own
        assert "1 of the kernel's threads had been moved" in str(said[0].message), said
    """)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def granted():
    """A control group of this machine's that grants half a CPU; skipped where none may be made."""
    top = Path("/sys/fs/cgroup/cpu") if Path("/sys/fs/cgroup/cpu").is_dir() else Path("/sys/fs/cgroup")
    group = top / f"ktmoe-test-{os.getpid()}"
    try:
        group.mkdir()
        v1 = (group / "cpu.cfs_quota_us").exists()
        (group / ("cpu.cfs_quota_us" if v1 else "cpu.max")).write_text("50000" if v1 else "50000 100000")
    except OSError as error:
        with suppress(OSError):
            group.rmdir()
        pytest.skip(f"a real quota NOT verified on this host: no control group may be made ({error})")
    yield group
    for _ in range(100):  # until its last process is gone
        with suppress(OSError):
            group.rmdir()
            return
        time.sleep(0.05)


def test_a_real_quota_is_noticed(granted):
    script = textwrap.dedent(f"""
        import os, time, warnings
        open({str(granted / "cgroup.procs")!r}, "w").write(str(os.getpid()))
        from ktmoe import drift
        from ktmoe.cores import quota, usable_cores
        drift._EVERY, watch = 0.0, drift.Watch()
        watch.look()
        end = time.monotonic() + 3
        while time.monotonic() < end:
            pass
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            watch.look()
        print(quota(), usable_cores(), *(str(w.message) for w in said))
    """)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("0.5 1 ktmoe: the quota of 0.5 CPUs of this container or job stopped it in"), done
