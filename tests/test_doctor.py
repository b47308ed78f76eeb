"""`ktmoe doctor`: each surrounding that stands in somebody's way, and its remedy."""

import json
import os
import subprocess
import sys

import psutil
import pytest
from test_cgroups import group
from test_cores import tree, two_sockets
from test_packaging import pins

from ktmoe.doctor import Status, machine, probe, software
from ktmoe.tested import PAIRS, VERSIONS


GIB = 2**30
OK, NOTE, PROBLEM = Status.OK, Status.NOTE, Status.PROBLEM


@pytest.fixture
def have(monkeypatch):
    """Sets what is installed: versions by name, the tested ones otherwise, "" for what is missing."""

    def set_versions(**versions):
        known = {**VERSIONS, "accelerate": "1", "datasets": "1", "omegaconf": "1"}
        known |= {name.replace("_", "-"): version for name, version in versions.items()}
        for module in (software, probe):
            monkeypatch.setattr(module, "installed", lambda name: known.get(name, ""))

    return set_versions


@pytest.mark.parametrize(
    ("flags", "says", "status"),
    [
        ("avx2 avx512f avx512_bf16 amx_bf16 amx_tile", "with AMX", OK),
        ("avx2 avx512f avx512_bf16", "without AMX", OK),
        ("avx2 avx512f", "neither AMX nor AVX512-BF16", NOTE),
        ("avx2", "neither AMX nor AVX512-BF16", NOTE),
    ],
)
def test_cpu(tmp_path, flags, says, status):
    one = f"model name\t: Some CPU\nflags\t\t: fpu {flags}\n\n"
    found = machine.cpu(tree(tmp_path, {"proc/cpuinfo": 2 * one}))
    assert found.what.startswith("Some CPU, ")
    assert says in found.what
    assert found.status is status


def test_no_word_about_the_cpu(tmp_path):
    assert machine.cpu(tmp_path).what.startswith("unknown CPU")


def test_mask_siblings_nodes_and_quota(tmp_path, monkeypatch):
    two_sockets(tmp_path, {2, 3, 6}, monkeypatch)
    found = machine.cores_to_use(tmp_path)
    assert found.what == "2 usable: 2 physical in the affinity mask (3 logical), NUMA node 1"
    assert found.status is OK
    tree(tmp_path, {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "100000 100000"})
    found = machine.cores_to_use(tmp_path)
    assert "1 usable" in found.what
    assert "a quota of 1 CPUs" in found.what
    assert found.status is NOTE
    tree(tmp_path, {"sys/fs/cgroup/cpu.max": "800000 100000"})
    assert machine.cores_to_use(tmp_path).status is OK


@pytest.mark.parametrize(("omp", "status"), [(None, OK), ("4", OK), ("1", NOTE), ("9", NOTE), ("what", OK)])
def test_threads(monkeypatch, omp, status):
    monkeypatch.setattr(machine, "usable_cores", lambda root: 4)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if omp:
        monkeypatch.setenv("OMP_NUM_THREADS", omp)
    found = machine.threads()
    assert found.status is status
    assert found.remedy == ("" if status is OK else "export OMP_NUM_THREADS=4")


@pytest.mark.parametrize(("limit", "status"), [("max", OK), (2 * GIB, PROBLEM)])
def test_memory(tmp_path, monkeypatch, limit, status):
    there = psutil.virtual_memory()._replace(total=16 * GIB, available=12 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: there)
    tree(tmp_path, {"proc/self/cgroup": "0::/"} | group("sys/fs/cgroup", limit, GIB))
    found = machine.host_memory(tmp_path)
    assert found.status is status
    assert found.what.startswith("12.0 of 16.0" if status is OK else "1.0 of 2.0")


def test_caches(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KTMOE_CACHE_DIR", str(tmp_path / "not" / "there" / "yet"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "file" / "inside"))
    own, hub = machine.caches()
    assert own.status is OK
    assert not (tmp_path / "not").exists()
    assert hub.status is PROBLEM
    assert "cannot be written to" in hub.what
    assert hub.remedy.startswith("export HF_HOME=")
    monkeypatch.setattr(machine, "_LITTLE_DISK", 2**60)
    assert next(machine.caches()).remedy.startswith("export KTMOE_CACHE_DIR=")


@pytest.mark.parametrize(("transformers", "peft"), PAIRS)
def test_pairs_that_are_tested(have, transformers, peft):
    have(transformers=transformers, peft=peft)
    *_, together = software.libraries()
    reads = transformers < "5" or peft not in ("0.18.1",)
    assert together.status is (OK if reads else NOTE)
    assert ("tested" if reads else "does not read adapters of routed experts") in together.what


def test_other_pairs(have):
    have(transformers="5.99.0")
    assert "newer than what was tested" in list(software.libraries())[-1].what
    have(transformers="5.6.0")
    assert "not this very pair" in list(software.libraries())[-1].what
    have(transformers="4.39.0", peft="")
    findings = {f.name: f for f in software.libraries()}
    assert findings["transformers"].status is PROBLEM
    assert "ktmoe needs >=4.40" in findings["transformers"].what
    assert findings["peft"].remedy == f"pip install peft=={VERSIONS['peft']}"
    assert "together" not in findings


def test_ktmoe_run_from_a_folder_has_no_ranges(have, monkeypatch):
    def requires(name):
        raise software.PackageNotFoundError(name)

    have()
    monkeypatch.setattr(software, "requires", requires)
    assert {f.status for f in software.libraries()} == {OK}


def test_llamafactory(have):
    have()
    assert [f.status for f in software.llamafactory()] == [OK]
    have(llamafactory="")
    (found,) = software.llamafactory()
    assert found.status is NOTE
    assert found.remedy == f"pip install --no-deps llamafactory=={VERSIONS['llamafactory']}"
    have(llamafactory="0.9.4", trl="")
    assert [(f.name, f.status) for f in software.llamafactory()] == [("LLaMA-Factory", PROBLEM), ("trl", PROBLEM)]


def test_kernel(have, monkeypatch):
    monkeypatch.delenv("KT_KERNEL_CPU_VARIANT", raising=False)
    have()
    assert probe.kernel(["AMXBF16", "AMXFP8"], "amx").what.endswith("variant amx: AMXBF16, AMXFP8")
    assert probe.kernel(["AMXBF16"], "amx").status is OK
    assert probe.kernel([], "this CPU cannot").what == "this CPU cannot; the torch backend runs the experts"
    monkeypatch.setenv("KT_KERNEL_CPU_VARIANT", "avx2")
    assert probe.kernel([], "no classes").remedy == "unset KT_KERNEL_CPU_VARIANT"
    have(kt_kernel="0.7.3")
    monkeypatch.delenv("KT_KERNEL_CPU_VARIANT")
    assert "not the tested version" in probe.kernel(["AMXBF16"], "amx").what
    have(kt_kernel="")
    remedy = probe.kernel([], "cannot be imported").remedy
    assert remedy == f"pip install --no-deps kt-kernel=={VERSIONS['kt-kernel']}"


def run(*options, **environment):
    command = [sys.executable, "-m", "ktmoe.cli", "doctor", *options]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120)


def test_the_command(tmp_path):
    (tmp_path / "file").write_text("")
    done = run(
        "--json", KT_KERNEL_CPU_VARIANT="avx2", OMP_NUM_THREADS="99", KTMOE_CACHE_DIR=str(tmp_path / "file" / "inside")
    )
    assert done.returncode == 1, done.stderr
    told = json.loads(done.stdout)
    assert told["problems"] >= 1
    found = {f["name"]: f for f in told["findings"]}
    assert found["ktmoe cache"]["status"] == "problem"
    assert found["threads"]["status"] == "note"
    assert found["kernel"]["status"] == "note"
    assert {"CPU", "cores", "memory", "Python", "torch", "transformers", "peft", "GPU"} <= found.keys()


def test_it_runs_where_torch_does_not(tmp_path):
    """Which is when it is needed; and as a table, with a block to paste."""
    (tmp_path / "torch.py").write_text("raise ImportError('libtorch is broken')")
    done = run(PYTHONPATH=f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}", NO_COLOR="1", COLUMNS="200")
    assert done.returncode == 1, done.stderr
    assert done.stderr == ""
    assert "torch and ktmoe cannot be imported: ImportError: libtorch is broken" in done.stdout
    block = done.stdout.split("```")[1]
    assert "[problem] import: torch and ktmoe cannot be imported" in block
    assert "\x1b" not in done.stdout


def test_the_tested_versions_are_those_that_are_pinned():
    assert {name: pins()[name] for name in VERSIONS} == VERSIONS
    assert (VERSIONS["transformers"], VERSIONS["peft"]) in PAIRS
