"""What every test relies on: no network, no thread storms, poisoned memory, and a plain word about the kernel."""

import faulthandler
import os
import shutil
import sys
import tempfile
from pathlib import Path

import real_model as real_models


# Before torch and the Hugging Face libraries are imported, which read these once; child processes inherit them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
os.environ.update(HF_HUB_DISABLE_TELEMETRY="1", WANDB_MODE="disabled", MPLBACKEND="Agg")
# Tests that start a Python of their own use the same helpers there.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH"))))
# Gate certificates, datasets and fonts are cached under this: tests neither read nor write the user's own.
_CACHE = tempfile.mkdtemp(prefix="ktmoe-tests-")
os.environ["XDG_CACHE_HOME"] = _CACHE
for _name in ("HF_HOME", "HF_DATASETS_CACHE", "HF_HUB_CACHE", "MPLCONFIGDIR", "KTMOE_CACHE_DIR"):
    os.environ.pop(_name, None)
os.environ.pop("THP_MEM_ALLOC_ENABLE", None)  # tests of memory measure torch's allocator as it comes

import hypothesis
import pytest
import torch

from ktmoe.backends import kt as kernel_backend


# torch.empty and its relatives, also those called from C++, return NaN (integers: the largest value), so that memory
# which nobody wrote shows. It costs one write of the memory; warn_only, since nothing here is about determinism.
torch.use_deterministic_algorithms(True, warn_only=True)
torch.utils.deterministic.fill_uninitialized_memory = True

hypothesis.settings.register_profile("default", max_examples=25, derandomize=True, deadline=None)
hypothesis.settings.register_profile(
    "nightly", max_examples=10_000, derandomize=False, deadline=None, print_blob=True, database=None
)
_PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "default")
hypothesis.settings.load_profile(_PROFILE)

_KERNEL = ("ktmoe", "kernel")  # the user property that marks reports of kernel tests


def pytest_unconfigure():
    shutil.rmtree(_CACHE, ignore_errors=True)


def pytest_collection_modifyitems(items):
    """10,000 examples take longer than any other test may."""
    for item in items:
        if _PROFILE == "nightly" and hypothesis.is_hypothesis_test(getattr(item, "function", None)):
            item.add_marker(pytest.mark.timeout(12 * 3600))


def _needs_kernel(item):
    return item.get_closest_marker("kernel") is not None or "kernel" in getattr(item, "fixturenames", ())


def pytest_runtest_setup(item):
    # pytest's watchdog knows one time for all tests, and would end the run within one that may take longer.
    mark = item.get_closest_marker("timeout")
    if mark and mark.args[0] > item.config.getini("faulthandler_timeout"):
        faulthandler.dump_traceback_later(mark.args[0] + 60, exit=True, file=sys.__stderr__)
    if _needs_kernel(item):
        item.user_properties.append(_KERNEL)
        if not kernel_backend.available():
            pytest.skip(f"kernel NOT verified on this host: {kernel_backend.variant()}")
    if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
        pytest.skip("GPU NOT verified on this host: torch sees none")


@pytest.fixture(autouse=True)
def _environment_as_found():
    """Each test leaves the environment as it found it: the processes that later tests start would inherit it.

    `ktmoe train` sets some for its process, and the memory of a sweep over models grew under them.
    """
    found = dict(os.environ)
    yield
    if dict(os.environ) != found:
        os.environ.clear()
        os.environ.update(found)


@pytest.fixture(scope="session")
def kernel():
    """The package `ktmoe.backends.kt`, on hosts where it can compute; elsewhere the test is skipped."""
    return kernel_backend


@pytest.fixture(scope="session")
def real_model():
    """SmolLM2-135M-Instruct, dense and upcycled, as `real_model.RealModel`; skipped where the package is missing."""
    return _or_skip(real_models.checkpoints)


@pytest.fixture(scope="session")
def real_layers():
    """As `real_model`, the first four layers only."""
    return _or_skip(real_models.few_layers)


def _or_skip(make):
    try:
        return make()
    except ModuleNotFoundError as error:
        pytest.skip(f"real model NOT verified: {error}")


def pytest_terminal_summary(terminalreporter):
    """Says which kernel the run held to account: a skipped kernel must not look like a verified one."""

    def count(outcome):
        reports = terminalreporter.stats.get(outcome, [])
        return sum(_KERNEL in [tuple(p) for p in getattr(report, "user_properties", ())] for report in reports)

    passed, failed = count("passed"), count("failed") + count("error")
    terminalreporter.section("kernel")
    if not kernel_backend.available():
        line = f"kernel NOT verified on this host: {kernel_backend.variant()}"
    elif failed:
        line = f"kernel NOT verified on this host: {failed} tests of {kernel_backend.variant()} failed"
    elif not passed:
        line = f"kernel NOT verified on this host: {kernel_backend.variant()} is there, but no test of it ran"
    else:
        line = f"kernel variant verified: {kernel_backend.variant()} ({passed} tests)"
    terminalreporter.write_line(line, green=line.startswith("kernel variant"), yellow="NOT" in line)
