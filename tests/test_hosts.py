"""Two hosts train as one: network namespaces of this machine, with a cable between them and names of their own."""

import os
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch
from factory import save_model
from helpers import run_ranks


pytestmark = pytest.mark.slow

TRAIN = """
import os, peft, torch, ktmoe, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
if "RANK" in os.environ:
    dist.init_process_group("gloo")
rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
torch.manual_seed(rank)
lora = peft.LoraConfig(r=4, target_modules=["q_proj", "experts"])
if world == 1:
    torch.manual_seed(0)
model = ktmoe.load_model({model!r}, ktmoe.KTConfig(kt_backend="reference"), lora=lora, dtype=torch.float32)
wrapped = DistributedDataParallel(model) if world > 1 else model
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
for step in range(5):
    ids = torch.randint(2, 200, (4, 12), generator=torch.Generator().manual_seed(step)).chunk(world)[rank]
    wrapped(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
if rank == 0:
    torch.save({{n: p.detach() for n, p in model.named_parameters() if p.requires_grad}}, {out!r})
if world > 1:
    from ktmoe.processes import join
    print("owner", join().owner, "of", join().on_host)
"""


def run(*command):
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture
def hosts():
    """Names of two network namespaces, their addresses and interfaces; skipped where none may be made."""
    if not shutil.which("ip") or not shutil.which("unshare"):
        pytest.skip("two hosts NOT verified: no ip or unshare here")
    names = [f"ktmoe{os.getpid()}{side}" for side in "ab"]
    made = [run("ip", "netns", "add", name) for name in names]
    try:
        if any(m.returncode for m in made):
            pytest.skip(f"two hosts NOT verified: no network namespace may be made ({made[0].stderr.strip()})")
        ends = [f"kt{os.getpid() % 10**6}{side}" for side in "ab"]
        run(
            "ip", "link", "add", ends[0], "netns", names[0], "type", "veth", "peer", "name", ends[1], "netns", names[1]
        )
        for i, (name, end) in enumerate(zip(names, ends, strict=True)):
            run("ip", "-n", name, "addr", "add", f"10.231.7.{i + 1}/24", "dev", end)
            for device in (end, "lo"):
                run("ip", "-n", name, "link", "set", device, "up")
        yield list(zip(names, ends, strict=True))
    finally:
        for name in names:
            run("ip", "netns", "del", name)


@pytest.mark.parametrize("each", [1, 2])
def test_two_hosts_train_as_one(hosts, tmp_path, each):
    save_model(tmp_path / "model")
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(TRAIN.format(model=str(tmp_path / "model"), out=str(tmp_path / "both"))))
    children = []
    for rank, (name, end) in enumerate(hosts):
        launch = ["-m", "torch.distributed.run", "--nnodes=2", f"--node_rank={rank}", f"--nproc_per_node={each}"]
        launch += ["--master_addr=10.231.7.1", "--master_port=29533", str(script)]
        started = ["ip", "netns", "exec", name, "unshare", "-u", "sh", "-c", f'hostname {name}; exec "$@"', "sh"]
        children.append(
            subprocess.Popen(
                [*started, sys.executable, *launch],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, "GLOO_SOCKET_IFNAME": end, "OMP_NUM_THREADS": "1"},
            )
        )
    said = [child.communicate(timeout=180) for child in children]
    assert [child.returncode for child in children] == [0, 0], said
    for rank, (out, _) in enumerate(said):
        own = tuple(range(rank * each, rank * each + each))
        assert out.count(f"owner {own[0]} of {own}") == each
    (alone,) = run_ranks(TRAIN.format(model=str(tmp_path / "model"), out=str(tmp_path / "one")), 1)
    assert alone.returncode == 0, alone.stderr
    both, one = torch.load(tmp_path / "both"), torch.load(tmp_path / "one")
    for name, expected in one.items():
        assert (both[name] - expected).abs().max() <= 2e-5 * expected.abs().max(), name
