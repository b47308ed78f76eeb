"""kt_kernel's AMX binary held to the contract on a CPU without AMX, and the emulation itself to plain C arithmetic."""

import os
import subprocess
import sys
import textwrap

import pytest
from amx_emulation import build
from helpers import KERNELS


NATIVE = "amx_tile" in build.cpu_flags()
TILES = ("AMXBF16", "AMXInt8")  # the classes that use them; the others compute with AVX512-BF16 in this binary too
CHECKS = (
    "tiles",
    "rip-relative",
    "tdpbf16ps",
    "bf16-extremes",
    "tdpbssd",
    "tdpbsud",
    "tdpbusd",
    "tdpbuud",
    "vpdpbusd",
    "permission",
    "faults",
    "handler",
    "threads",
)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The library and the checking program."""
    if build.missing():
        pytest.skip(f"AMX NOT verified on this host: {build.missing()}")
    directory = tmp_path_factory.mktemp("amx")
    return build.library(directory), build.checker(directory)


def run(command, library):
    """Output of a command that runs on the emulation; a crash is a failure that says what was printed before it."""
    env = {**os.environ, **build.environment(library)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout}\n{done.stderr[-2000:]}"
    return done.stdout.splitlines()


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_instructions_equal_plain_arithmetic(built, check, seed):
    library, checker = built
    *_, verdict, emulated = run([checker, check, str(seed)], library)
    assert verdict == "ok"
    if check == "vpdpbusd":
        assert int(emulated) > 0  # on every CPU: a breakpoint hands it over
    elif check not in ("permission", "faults"):  # which run nothing here, or in children
        assert (int(emulated) > 0) == (not NATIVE)


CONTRACT = """
    import ctypes
    import sys

    from helpers import SMALL, limits, loaded

    from ktmoe.gate import contract
    from ktmoe.types import MoEShape

    name = sys.argv[1]
    shapes = [SMALL, MoEShape(4, 256, 64, 2, 8), MoEShape(4, 64, 320, 2, 3), MoEShape(3, 128, 128, 1, 128)]
    for shape in shapes:
        for tokens in (24, 90):  # the contract's limits are for means over more than a few tokens
            backend, case = loaded(name, shape, tokens=tokens)
            rows = contract.measure(case, contract.answer(backend, case), contract.specification(case))
            whole = {m.name: m.error for m in rows if m.expert is None and m.token is None}
            worst = max(error for tensor, error in whole.items() if tensor != "output")
            print(f"{name} {shape} {tokens}: output {whole['output']:.4f}, gradients up to {worst:.4f}")
            found = contract.violations(rows, limits(name))
            assert found == [], found
    print(ctypes.CDLL(None).amx_emulation_count())
"""


@pytest.mark.kernel
@pytest.mark.parametrize("name", KERNELS)
def test_the_amx_binary_holds_the_contract(built, name):
    library, _ = built
    *report, emulated = run([sys.executable, "-c", textwrap.dedent(CONTRACT), name], library)
    print("\n".join(report), f"\n{emulated} instructions emulated")
    assert (int(emulated) > 0) == (name in TILES and not NATIVE)


@pytest.mark.kernel
def test_the_variant_is_amx(built):
    library, _ = built
    assert run([sys.executable, "-m", "ktmoe.backends"], library)[-1] == "kernel variant: amx"
