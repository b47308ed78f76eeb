"""Shared by the tests: the backends under test, layers to run them on, and how close is close."""

import atexit
import functools
import multiprocessing
import os
import socket
import sys
import tempfile
import textwrap
import time
import traceback
from types import SimpleNamespace

import pytest
import torch

from ktmoe.backends import TABLE, build
from ktmoe.config import KTConfig
from ktmoe.experts import MoEExperts
from ktmoe.gate import contract
from ktmoe.planning import plan
from ktmoe.stored import Stored
from ktmoe.types import PROJECTIONS, ExpertWeights, MoEShape


KERNELS = ("AMXBF16", "AMXInt8", "AMXFP8", "AMXInt4")
ANY_SOURCE = [k for k in KERNELS if not TABLE[k].stored]  # the others take weights that are stored in their format
BACKENDS = [
    pytest.param(b, marks=[pytest.mark.kernel] if b in KERNELS else []) for b in ("reference", "torch", *KERNELS)
]
KERNEL_BACKENDS = [pytest.param(b, marks=[pytest.mark.kernel]) for b in KERNELS]
BF16_KERNELS = [pytest.param(b, marks=[pytest.mark.kernel]) for b in ANY_SOURCE]
# Of what is the same for every kernel, the newer formats' share is left to `nox -s accuracy`.
STORED_KERNELS_SLOW = [
    pytest.param(b, marks=[pytest.mark.kernel, pytest.mark.slow]) for b in KERNELS if TABLE[b].stored
]
BF16_BACKENDS = [b for b in BACKENDS if b.values[0] not in KERNELS or b.values[0] in ANY_SOURCE]
# Where the CPU has no instructions for bf16, oneDNN packs nothing and the torch backend computes in fp32.
PACKS = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
needs_packing = pytest.mark.skipif(
    not PACKS, reason="oneDNN's packed weights NOT verified on this host: the CPU has no instructions for bfloat16"
)
# Starts children that have imported everything and started nothing: a Python of its own takes seconds for that.
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["guards", "helpers"])
# How close single elements are: a few tokens per expert are too few for a mean.
SLACK = {"reference": 1e-5, "torch": 0.02, "AMXBF16": 0.02, "AMXInt8": 0.08, "AMXFP8": 0.02, "AMXInt4": 0.04}
SMALL = MoEShape(num_experts=4, hidden_size=64, intermediate_size=64, top_k=2, rank=4)


def fitting(name, shape=SMALL):
    """A shape, or where a backend does not take it the next larger one."""
    return contract.fitting(TABLE[name], shape)


def draw(name, shape=SMALL, tokens=24, seed=0):
    """A case of sizes and with weights that a backend takes: bf16, or stored in its format."""
    return contract.draw_case(fitting(name, shape), tokens, seed, TABLE[name].stored)


@functools.cache  # the kernel leaks the weights of destroyed objects: few are built, and kept
def loaded(name, shape, seed=0, max_len=256, tokens=24):
    """A backend loaded with a drawn case, and the case."""
    case = draw(name, shape, tokens, seed)
    decided = plan(KTConfig(kt_backend=name, kt_max_len=max_len, kt_num_threads=1), case.shape)
    assert decided.backend == name, decided.note
    return build(decided, case.weights, case.shape, case.lora.scaling), case


def relative(got, expected):
    """mean |got - expected| / mean |expected|."""
    got, expected = got.double(), expected.double()
    return ((got - expected).abs().mean() / expected.abs().mean().clamp_min(1e-30)).item()


def limits(name):
    """This project's own tight limits, from the exact formula: for INT8 those of the format on drawn weights."""
    return contract.DRAWN_INT8 if name == "AMXInt8" else TABLE[name].expected


def weights(shape=SMALL, seed=0, name="torch"):
    """Expert weights of a layer, as `draw` gives them."""
    return draw(name, shape, 1, seed).weights


@functools.cache
def module(name, shape=SMALL, max_len=256, seed=0):
    """A `MoEExperts` with non-zero LoRA of its own, r = shape.rank, alpha = 2 r."""
    config = KTConfig(kt_backend=name, kt_max_len=max_len, kt_num_threads=1)
    held, r = weights(shape, name=name), fitting(name, shape).rank
    experts = MoEExperts(held, top_k=shape.top_k, r=r, lora_alpha=2 * r, config=config)
    g = torch.Generator().manual_seed(seed)
    for p in experts.parameters():
        p.data = torch.randn(p.shape, generator=g) * 0.1
    return experts


def call(experts, tokens=10, seed=1, dtype=torch.float32):
    """Leaves for one call: hidden_states, index, weights."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, experts.hidden_size, generator=g).to(dtype).requires_grad_()
    index = torch.rand(tokens, experts.num_experts, generator=g).argsort(-1)[:, : experts.top_k]
    w = torch.rand(tokens, experts.top_k, generator=g).requires_grad_()
    return x, index, w


def gradients(experts, loss, *leaves):
    """Gradients of the leaves and of the module's LoRA, without touching `.grad`."""
    return torch.autograd.grad(loss, [*leaves, *experts.parameters()], retain_graph=True)


def exact(held):
    """Gate, up and down [E, ...] as one tensor each: what the weights mean, without any rounding."""
    stacks = [getattr(held, p) for p in PROJECTIONS]
    return [torch.stack(list(s.exact() if isinstance(s, Stored) else s)) for s in stacks]


def chosen(held, experts):
    """Some experts of a layer in another order, as sequences of matrices."""
    return ExpertWeights(*(_chosen(getattr(held, p), experts) for p in PROJECTIONS))


def _chosen(stack, experts):
    if not isinstance(stack, Stored):
        return [stack[e] for e in experts]
    return type(stack)([stack.matrices[e] for e in experts], [stack.scales[e] for e in experts])


def train_on(tuned, ids, steps, lr):
    """Losses of a model that learns a batch by heart."""
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=lr)
    losses = []
    for _ in range(steps):
        loss = tuned(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def run_python(code, timeout=120):
    """Runs code in a process of its own, since what it does may crash or hang. As `subprocess.run` with text."""
    (done,) = _run(code, [{}], timeout)
    return done


def free_port():
    """A port of this host that nothing listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def run_ranks(code, number, timeout=120, hosts=1):
    """Runs code in processes that a launcher might have started, and ends each as Python would. A result for each.

    Args:
        code: finds its environment as torchrun sets it.
        number: of processes; for 1, no launcher.
        timeout: seconds for all together.
        hosts: that the processes believe to be on.
    """
    if number == 1:
        return [run_python(code, timeout)]
    port = free_port()
    each = number // hosts
    launched = [
        {"RANK": r, "LOCAL_RANK": r % each, "WORLD_SIZE": number, "LOCAL_WORLD_SIZE": each, "GROUP_RANK": r // each}
        | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for r in range(number)
    ]
    return _run(code, [{k: str(v) for k, v in one.items()} for one in launched], timeout)


def _run(code, environments, timeout):
    with tempfile.TemporaryDirectory() as folder:
        own = [os.path.join(folder, str(i)) for i in range(len(environments))]
        children = []
        for environment, path in zip(environments, own, strict=True):
            os.mkdir(path)
            children.append(FORKSERVER.Process(target=_execute, args=(textwrap.dedent(code), path, environment)))
            children[-1].start()
        end = time.monotonic() + timeout
        for child in children:
            child.join(max(0, end - time.monotonic()))
        results = []
        for child, path in zip(children, own, strict=True):
            child.kill()
            child.join()
            out, err = (open(os.path.join(path, name)).read() for name in ("stdout", "stderr"))
            results.append(SimpleNamespace(returncode=child.exitcode, stdout=out, stderr=err))
        return results


def _execute(code, folder, environment):
    os.environ.update(environment)
    for fd, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(os.path.join(folder, name), os.O_WRONLY | os.O_CREAT), fd)
    sys.stdout, sys.stderr = (os.fdopen(fd, "w", buffering=1, closefd=False) for fd in (1, 2))
    failed = False
    try:
        exec(compile(code, "<test>", "exec"), {"__name__": "__main__"})
    except Exception as error:
        sys.last_type, failed = type(error), True
        traceback.print_exc()
    if environment:
        atexit._run_exitfuncs()  # multiprocessing's children leave without
    sys.exit(int(failed))
