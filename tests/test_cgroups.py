"""Memory that a container or a batch job grants, from drawn `/proc` and `/sys`."""

import psutil
import pytest
from test_cores import tree

from ktmoe import memory


GIB = 2**30
FREE, ALL = 8 * GIB, 16 * GIB
V2, V1 = "sys/fs/cgroup", "sys/fs/cgroup/memory"


def group(folder, limit, used, cached=0):
    return {
        f"{folder}/memory.max": limit,
        f"{folder}/memory.current": used,
        f"{folder}/memory.stat": f"anon 1\ninactive_file {cached}",
    }


def older(folder, limit, used, cached=0):
    return {
        f"{folder}/memory.limit_in_bytes": limit,
        f"{folder}/memory.usage_in_bytes": used,
        f"{folder}/memory.stat": f"inactive_file 5\ntotal_inactive_file {cached}",
    }


@pytest.mark.parametrize(
    ("path", "files", "total", "available"),
    [
        ("0::/", {}, ALL, FREE),
        ("0::/", group(V2, "max", 3 * GIB), ALL, FREE),
        ("0::/", group(V2, 4 * GIB, 3 * GIB, GIB), 4 * GIB, 2 * GIB),
        # what a batch job or a systemd slice grants stands where the process's own path says, or above
        ("0::/job_7/step_0", group(f"{V2}/job_7/step_0", 4 * GIB, GIB), 4 * GIB, 3 * GIB),
        (
            "0::/job_7/step_0",
            group(f"{V2}/job_7", 6 * GIB, 5 * GIB) | group(f"{V2}/job_7/step_0", "max", GIB),
            6 * GIB,
            GIB,
        ),
        (
            "0::/pod/c",
            group(f"{V2}/pod", 3 * GIB, GIB) | group(f"{V2}/pod/c", 6 * GIB, 5 * GIB),
            3 * GIB,
            GIB,
        ),
        # a container that sees its own group as the top, and one that has used more than it may
        ("0::/docker/abc", group(V2, 4 * GIB, GIB), 4 * GIB, 3 * GIB),
        ("0::/", group(V2, 4 * GIB, 5 * GIB), 4 * GIB, 0),
        # version 1, whose "no limit" is a number, and both at once
        (
            "4:memory:/slurm/job_7\n1:name=systemd:/x",
            older(f"{V1}/slurm/job_7", 4 * GIB, 3 * GIB, GIB),
            4 * GIB,
            2 * GIB,
        ),
        ("4:memory:/", older(V1, 2**63 - 4096, 9 * GIB), ALL, FREE),
        ("4:memory:/\n0::/", older(V1, 2**63 - 4096, 0) | group(f"{V2}/unified", 2 * GIB, 0), 2 * GIB, 2 * GIB),
        # a limit above what the machine has
        ("0::/", group(V2, 64 * GIB, GIB), ALL, FREE),
    ],
)
def test_memory_that_is_granted(tmp_path, monkeypatch, path, files, total, available):
    machine = psutil.virtual_memory()._replace(total=ALL, available=FREE)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: machine)
    tree(tmp_path, {"proc/self/cgroup": path} | files)
    assert memory.total(tmp_path) == total
    assert memory.available(tmp_path) == available


def test_this_machine_grants_some():
    assert 0 < memory.available() <= memory.total() <= psutil.virtual_memory().total
