"""Every trap of docs/kernel.md is noticed by its probe without its guard; with it, `nox -s accuracy` runs them all."""

import pytest
from guards import GUARDS
from helpers import FORKSERVER, KERNELS

from ktmoe.verify.probes import TRAPS


# INT8 does not read the expert map when it quantises by itself. K30 to K34 are of single formats.
HARMLESS = {(20, "AMXInt8")}
HARMLESS |= {(number, name) for number in (30, 34) for name in ("AMXBF16", "AMXInt8")}
# INT4 has a class of its own making: with both of these CPUs' variants it does not have those traps.
HARMLESS |= {(number, "AMXInt4") for number in (5, 9, 10, 14, 16, 21, 23, 30)}
HARMLESS |= {(number, name) for number in (31, 32, 33) for name in KERNELS if name != "AMXInt4"}


def test_every_trap_has_a_probe_and_a_guard():
    assert sorted(TRAPS) == sorted(GUARDS) == list(range(1, 35))


def probe_without_guard(answers, number, name):
    try:
        GUARDS[number]()
    except Exception as error:  # it must be the kernel that goes wrong, not this test
        answers.send(error)
        return
    try:
        answers.send(TRAPS[number].probe(name))
    except Exception as error:
        answers.send([f"{type(error).__name__}: {error}"])


@pytest.mark.slow  # in `nox -s accuracy`
@pytest.mark.kernel
@pytest.mark.parametrize(("number", "name"), [(n, k) for n in GUARDS for k in KERNELS if (n, k) not in HARMLESS])
def test_a_missing_guard_is_noticed(number, name):
    receiver, sender = FORKSERVER.Pipe(duplex=False)
    child = FORKSERVER.Process(target=probe_without_guard, args=(sender, number, name))
    child.start()
    sender.close()
    try:
        found = receiver.recv() if receiver.poll(60) else ["it hangs"]
    except EOFError:
        child.join()
        found = [f"exit code {child.exitcode}"]
    child.kill()
    child.join()
    print(f"K{number}, {name}: {found[:3]}")
    assert not isinstance(found, Exception), f"the guard could not be taken away: {found!r}"
    assert found, f"without its guard, K{number} goes unnoticed"
