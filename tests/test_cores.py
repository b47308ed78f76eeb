"""Cores that are the process's own, from drawn `/proc` and `/sys`; and the kernel's threads on them."""

import os
from dataclasses import replace

import pytest
from helpers import KERNELS, SMALL, run_python, weights

from ktmoe import backends
from ktmoe import cores as module
from ktmoe.config import KTConfig
from ktmoe.cores import cores, numa_nodes, quota, shares, usable_cores
from ktmoe.planning import plan
from ktmoe.types import KTError, MoEShape


def tree(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n")
    return root


def two_sockets(root, mask, monkeypatch):
    """Two nodes of two cores with two hyper-threads each; CPU n + 4 is the sibling of CPU n."""
    monkeypatch.setattr(module, "mask", lambda: mask)
    system = "sys/devices/system"
    files = {f"{system}/cpu/cpu{n}/topology/thread_siblings_list": f"{n % 4},{n % 4 + 4}" for n in range(8)}
    return tree(root, files | {f"{system}/node/node{n}/cpulist": f"{2 * n}-{2 * n + 1},{2 * n + 4}" for n in (0, 1)})


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"proc/self/cgroup": "0::/"}, None),
        ({"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/b/cpu.max": "max 100000"}, None),
        ({"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/b/cpu.max": "150000 100000"}, 1.5),
        # a pod's limit stands one level above the container's
        (
            {
                "proc/self/cgroup": "0::/pod/c",
                "sys/fs/cgroup/pod/cpu.max": "100000 100000",
                "sys/fs/cgroup/pod/c/cpu.max": "400000 100000",
            },
            1.0,
        ),
        # a container with a name space of its own, one without, and one that sees a path outside of its own
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "200000 100000"}, 2.0),
        ({"proc/self/cgroup": "0::/docker/abc", "sys/fs/cgroup/cpu.max": "50000 100000"}, 0.5),
        ({"proc/self/cgroup": "0::/../abc", "sys/fs/cgroup/cpu.max": "50000 100000"}, 0.5),
        # version 1, and both at once
        (
            {
                "proc/self/cgroup": "4:memory:/m\n2:cpu,cpuacct:/docker/abc\n1:name=systemd:/x",
                "sys/fs/cgroup/cpu,cpuacct/docker/abc/cpu.cfs_quota_us": "300000",
                "sys/fs/cgroup/cpu,cpuacct/docker/abc/cpu.cfs_period_us": "100000",
            },
            3.0,
        ),
        (
            {
                "proc/self/cgroup": "1:cpu:/\n0::/",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
                "sys/fs/cgroup/unified/cpu.max": "100000 100000",
            },
            1.0,
        ),
    ],
)
def test_quota(tmp_path, files, expected):
    assert quota(tree(tmp_path, files)) == expected


@pytest.mark.parametrize(
    ("mask", "allowed", "expected"),
    [
        (set(range(8)), "max", 4),  # hyper-threads share a core
        ({1, 5}, "max", 1),
        ({1, 5, 6}, "max", 2),
        (set(range(8)), "350000", 3),  # a thread that spins needs a whole CPU
        (set(range(8)), "50000", 1),
        ({0, 1}, "800000", 2),
    ],
)
def test_usable_cores(tmp_path, monkeypatch, mask, allowed, expected):
    two_sockets(tmp_path, mask, monkeypatch)
    tree(tmp_path, {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": f"{allowed} 100000"})
    assert usable_cores(tmp_path) == expected


def test_nodes_of_the_mask(tmp_path, monkeypatch):
    assert numa_nodes(tmp_path) == [0]
    two_sockets(tmp_path, {0, 1, 2, 3, 4, 6}, monkeypatch)
    assert numa_nodes(tmp_path) == [0, 1]
    assert cores(tmp_path) == [[0, 4], [1], [2, 6], [3]]
    assert cores(tmp_path, 1) == [[2, 6], [3]]
    two_sockets(tmp_path, {3}, monkeypatch)
    assert numa_nodes(tmp_path) == [1]  # a pool on node 0 would leave the mask


def test_nodes_with_most_cores_come_first(tmp_path, monkeypatch):
    two_sockets(tmp_path, {0, 2, 3, 7}, monkeypatch)
    assert numa_nodes(tmp_path) == [1, 0]
    assert usable_cores(tmp_path, [1]) == 2
    assert usable_cores(tmp_path, [0]) == 1
    assert usable_cores(tmp_path, [0, 1]) == 3
    assert usable_cores(tmp_path, [5]) == 3  # of which nothing is known


SIX = MoEShape(num_experts=4, hidden_size=64, intermediate_size=384, top_k=2, rank=4)  # 1, 2 or 3 parts


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("keys", "nodes"),
    [
        ({}, (4,)),
        ({"kt_tp_enabled": True}, (4, 0, 7)),  # four nodes, and three parts at most
        ({"kt_tp_enabled": True, "kt_numa_nodes": [0, 2]}, (0, 2)),
        ({"kt_tp_enabled": True, "kt_numa_nodes": "7,0"}, (7, 0)),
        ({"kt_numa_nodes": 7}, (7,)),
    ],
)
def test_pools_are_on_the_nodes_that_were_named(monkeypatch, kernel, keys, nodes):
    """Ids need not be 0 to n - 1."""
    monkeypatch.setattr("ktmoe.planning.numa_nodes", lambda: [4, 0, 7, 2])
    found = plan(KTConfig(kt_backend="AMXInt8", **keys), SIX)
    assert (found.nodes, found.tp) == (nodes, len(nodes))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"kt_numa_nodes": [0, 2]}, "kt_tp_enabled: true too"),
        ({"kt_numa_nodes": [5]}, "none on node 5"),
        ({"kt_tp_enabled": True, "kt_numa_nodes": [4, 0, 7, 2]}, "divide into 3 parts at most"),
        ({"kt_backend": "torch", "kt_numa_nodes": [0]}, "numactl --cpunodebind"),
        ({"kt_numa_nodes": []}, "expected ids of NUMA nodes"),
        ({"kt_numa_nodes": [0, 0]}, "each once"),
        ({"kt_numa_nodes": [True]}, "expected ids of NUMA nodes"),
        ({"kt_numa_nodes": "0,a"}, "expected ids of NUMA nodes"),
        ({"kt_numa_nodes": -1}, "expected ids of NUMA nodes"),
    ],
)
def test_nodes_that_cannot_be_are_refused(monkeypatch, keys, said):
    monkeypatch.setattr("ktmoe.planning.numa_nodes", lambda: [4, 0, 7, 2])
    monkeypatch.setitem(backends.TABLE, "AMXInt8", replace(backends.TABLE["AMXInt8"], refuse_host=lambda: ""))
    with pytest.raises(KTError, match=said):
        plan(KTConfig(**({"kt_backend": "AMXInt8"} | keys)), SIX)


def test_every_thread_has_cores_of_its_own():
    own = [[0, 4], [1, 5], [2], [3]]
    assert shares(4, own) == [{0, 4}, {1, 5}, {2}, {3}]
    assert shares(3, own) == [{0, 4}, {1, 5}, {2, 3}]
    assert shares(1, own) == [{0, 1, 2, 3, 4, 5}]
    assert shares(6, own) == [{0, 4}, {1, 5}, {2}, {3}, {0, 4}, {1, 5}]


@pytest.mark.kernel
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("threads", [1, 2])
def test_kernel_threads_stay_in_the_mask(name, threads):
    """As under `taskset` or `numactl`: the extension itself binds from core 0 on."""
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) < 2:
        pytest.skip("one core: nothing is outside of the mask")
    done = run_python(f"""
        import os, helpers
        from ktmoe.backends.kt import KernelBackend
        os.sched_setaffinity(0, {{{allowed[-1]}}})
        case = helpers.draw({name!r}, helpers.SMALL, 8)
        backend = KernelBackend({name!r}, case.weights, case.shape, threads={threads}, max_len=32)
        helpers.contract.answer(backend, case)
        tids = [int(tid) for tid in os.listdir("/proc/self/task")]
        names = [open(f"/proc/self/task/{{tid}}/comm").read() for tid in tids]
        assert sum(n.startswith("numa_") for n in names) == {threads}, names
        print(set().union(*(os.sched_getaffinity(tid) for tid in tids)))
    """)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str({allowed[-1]})


@pytest.mark.kernel
def test_two_kernel_threads_have_two_cores(kernel):
    if usable_cores() < 2:
        pytest.skip("one core")
    done = run_python("""
        import os, helpers
        case = helpers.contract.draw_case(helpers.SMALL, 8, 0)
        helpers.contract.answer(
            helpers.build(helpers.plan(helpers.KTConfig(kt_backend="AMXBF16", kt_num_threads=2), helpers.SMALL),
                          case.weights, helpers.SMALL, 1.0), case)
        masks = []
        for tid in os.listdir("/proc/self/task"):
            if open(f"/proc/self/task/{tid}/comm").read().startswith("numa_"):
                masks.append(os.sched_getaffinity(int(tid)))
        assert len(masks) == 2 and masks[0] and masks[1] and not masks[0] & masks[1], masks
    """)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("threads", "said"), [(3, 1), (2, 0), (None, 0)])
def test_more_threads_than_cores_are_said_once(monkeypatch, recwarn, threads, said):
    monkeypatch.setattr(backends, "usable_cores", lambda nodes=None: 2)
    monkeypatch.setattr("ktmoe.notices._said", set())
    config = KTConfig(kt_backend="torch", kt_num_threads=threads)
    for _ in range(2):
        backends.build(plan(config, SMALL), weights(), SMALL, 1.0)
    assert sum("they will wait for each other" in str(w.message) for w in recwarn) == said
