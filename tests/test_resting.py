"""The kernel's threads between tasks: they wait, and take no core from anyone; and they come back for every task."""

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from helpers import KERNEL_BACKENDS, SMALL, draw, loaded

from ktmoe.backends.kt import resting
from ktmoe.backends.kt.kernel import KernelBackend
from ktmoe.gate import contract


def ticks(threads):
    """CPU time of threads, in clock ticks of 10 ms."""
    total = 0
    for thread in threads:
        fields = Path(f"/proc/self/task/{thread}/stat").read_text().rpartition(")")[2].split()
        total += int(fields[11]) + int(fields[12])
    return total


@pytest.mark.parametrize("name", KERNEL_BACKENDS)
@pytest.mark.parametrize("threads", [1, 2])
def test_between_tasks_the_threads_take_no_time(name, threads):
    case = draw(name, SMALL, 40)
    backend = KernelBackend(name, case.weights, case.shape, threads=threads)
    taken = 0
    for _ in range(6):
        contract.answer(backend, case)
        before = ticks(backend._host._workers)
        time.sleep(0.04)  # they would spin for 50 ms
        taken += ticks(backend._host._workers) - before
    backend.close()
    assert taken <= 2  # 24 for one thread that spins


@pytest.mark.parametrize("name", KERNEL_BACKENDS)
def test_pools_take_turns(name):
    case = draw(name, SMALL, 40)
    backends = [KernelBackend(name, case.weights, case.shape, threads=t, max_len=32) for t in (1, 2, 1)]
    expected = contract.answer(backends[0], case)
    for turn in range(30):
        answer = contract.answer(backends[turn % 3], case)
        if turn % 3 != 1:  # more threads sum in another order
            assert (answer[0] == expected[0]).all()
    for backend in backends:
        backend.close()


@pytest.mark.kernel
def test_tokens_left_over_wake_too_early_and_nothing_else():
    """As after Ctrl-C between counting a thread and sending its signal."""
    backend, case = loaded("AMXBF16", SMALL, tokens=40)
    expected = contract.answer(backend, case)
    for _ in range(3):
        resting._resting += 2
        assert (contract.answer(backend, case)[0] == expected[0]).all()
    backend.close()


IN_A_CHILD = {
    "every number is an open file": """
        import os
        held = [os.open("/dev/null", os.O_RDONLY) for _ in range(80)]
        run()
        assert resting._signal() is None
    """,
    "other handlers stay": """
        import signal
        taken = []
        for number in range(40, signal.SIGRTMAX):
            signal.signal(number, lambda *_: taken.append(1))
        run()
        assert resting._signal() is not None and resting._signal() < 40
        signal.raise_signal(50)
        assert taken == [1]
    """,
    "signals of other kinds, from everywhere": """
        import os, signal, threading, time
        signal.signal(signal.SIGUSR1, lambda *_: None)
        running = True
        def send():
            while running:
                for thread in Host.get(1, 1)._workers:
                    libc.tgkill(os.getpid(), thread, signal.SIGUSR1)
                time.sleep(0.001)
        import ctypes
        libc = ctypes.CDLL(None)
        run()
        sender = threading.Thread(target=send)
        sender.start()
        for _ in range(50):
            run()
        running = False
        sender.join()
    """,
    "threads of others that started with the pool": """
        import threading, time
        from ktmoe.backends.kt import extension
        threads, turn = extension.running_threads, [0]
        other = threading.Thread(target=time.sleep, args=(20,), daemon=True)
        def with_another():
            turn[0] += 1
            if turn[0] == 2:  # after the pool has started
                other.start()
            return threads()
        extension.running_threads = with_another
        run()
        assert other.native_id in Host.get(1, 1)._tids
        assert other.native_id not in Host.get(1, 1)._workers and len(Host.get(1, 1)._workers) == 1
    """,
    "a forked child does not wake its parent's threads": """
        import os
        run()
        pid = os.fork()
        if pid == 0:
            resting.wake()
            os._exit(0)
        os.waitpid(pid, 0)
        before = ticks(Host.get(1, 1)._workers)
        import time
        time.sleep(0.04)
        assert ticks(Host.get(1, 1)._workers) - before <= 1
        run()
    """,
}


@pytest.mark.kernel
@pytest.mark.parametrize("what", IN_A_CHILD)
def test_in_a_process_of_its_own(what):
    prelude = """
        import warnings
        warnings.simplefilter("ignore")
        from helpers import SMALL
        from test_resting import ticks
        from ktmoe.backends.kt import resting
        from ktmoe.backends.kt.extension import Host
        from ktmoe.backends.kt.kernel import KernelBackend
        from ktmoe.gate import contract
        case = contract.draw_case(SMALL, 40, seed=0)
        made = []
        def run():
            if not made:
                made.append(KernelBackend("AMXBF16", case.weights, SMALL, threads=1))
            answer = contract.answer(made[0], case)
            made.append(answer[0])
            assert (answer[0] == made[1]).all()
    """
    program = textwrap.dedent(prelude) + textwrap.dedent(IN_A_CHILD[what])
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
