"""INT8 from disk: `ktmoe quantize` and `kt_weight_path`, whole, damaged, foreign and interrupted."""

import dataclasses
import fcntl
import gc
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap

import psutil
import pytest
import torch
from amx_emulation import build as amx
from helpers import SMALL, chosen, limits, weights
from test_loading import as_fp8
from test_models import IDS, logits, lora, model, moved
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import ktmoe
from ktmoe import KTConfig, KTError, MoEExperts
from ktmoe.backends import build
from ktmoe.backends import kt as kernel_module
from ktmoe.backends.kt.extension import Host
from ktmoe.backends.kt.kernel import KernelBackend
from ktmoe.backends.kt.packed import PackedModel
from ktmoe.cli import app
from ktmoe.convert.quantize import pack, quantize_model
from ktmoe.gate import contract
from ktmoe.models import attach, moe_layers
from ktmoe.planning import find_packed, plan
from ktmoe.types import MoEShape


pytestmark = pytest.mark.kernel

WIDE = MoEShape(num_experts=3, hidden_size=128, intermediate_size=256, top_k=2, rank=4)
KEY = "model.layers.{}.mlp.experts"


def layers(shape=SMALL, count=3):
    return {KEY.format(n): weights(shape, seed=n) for n in range(count)}


def int8(path=None, **options):
    """One thread: with more, the last bits of the kernel's sums depend on how busy the host is."""
    return KTConfig(
        **dict(kt_backend="AMXInt8", kt_num_threads=1, kt_max_len=96, kt_weight_path=path and str(path)) | options
    )


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Three layers of `SMALL`."""
    out = tmp_path_factory.mktemp("packed")
    pack(layers(), out, "drawn", threads=2)
    return out


@pytest.fixture
def folder(packed, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(packed, tmp_path / "packed")


def same(got, expected):
    """Output and every gradient, bit for bit."""
    (out, grads), (expected_out, expected_grads) = got, expected
    pairs = [
        (out, expected_out),
        (grads.hidden_states, expected_grads.hidden_states),
        (grads.top_k_weights, expected_grads.top_k_weights),
        *zip(grads.lora, expected_grads.lora, strict=True),
    ]
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("share_backward", [True, False])
@pytest.mark.parametrize(("shape", "tp"), [(SMALL, 1), (WIDE, 1), (WIDE, 2), (WIDE, 4)])
def test_the_same_bits_as_quantised_online(shape, tp, share_backward, tmp_path):
    cases = [contract.draw_case(shape, 24, seed) for seed in range(2)]
    pack({KEY.format(n): c.weights for n, c in enumerate(cases)}, tmp_path / "out", "drawn", tp, threads=tp)
    options = dict(scaling=2.0, threads=tp, tp=tp, max_len=96, share_backward=share_backward)
    there = PackedModel(tmp_path / "out")
    loaded = [KernelBackend("AMXInt8", c.weights, shape, **options, packed=there.find(c.weights)) for c in cases]
    online = [KernelBackend("AMXInt8", c.weights, shape, **options) for c in cases]
    shutil.rmtree(tmp_path / "out")  # nothing is read later
    for _ in range(2):
        for a, b, case in zip(loaded, online, cases, strict=True):
            answer = contract.answer(a, case)
            assert same(answer, contract.answer(b, case))
            rows = contract.measure(case, answer, contract.specification(case))
            assert contract.violations(rows, limits("AMXInt8")) == []


def test_objects_are_reused_and_not_mixed_with_those_that_quantise(packed):
    """K22: a kernel object that read from disk reads the next layer into itself, and no other object does."""
    shape = dataclasses.replace(SMALL, rank=5)  # objects that no other test has left
    there = PackedModel(packed)
    seen = []
    for seed in (0, 1, 2, 0):
        case = dataclasses.replace(contract.draw_case(shape, 24, seed), weights=weights(seed=seed))
        for found in (there.find(case.weights), None):
            backend = KernelBackend("AMXInt8", case.weights, shape, scaling=2.0, max_len=96, packed=found)
            seen.append((backend.reloaded, id(backend._made)))
            rows = contract.measure(case, contract.answer(backend, case), contract.specification(case))
            assert contract.violations(rows, limits("AMXInt8")) == []
            backend.close()
    assert [reloaded for reloaded, _ in seen] == [False] * 2 + [True] * 6
    assert len({made for _, made in seen[::2]}) == len({made for _, made in seen[1::2]}) == 1


def test_memory_of_loading_is_given_back(tmp_path):
    """Of 12 MiB a layer, the kernel's own buffers stay, and what was read does not."""
    shape = MoEShape(4, 1024, 1024, 2, 4)
    held = layers(shape)
    pack(held, tmp_path, "drawn", threads=2)
    there, process, used, backends = PackedModel(tmp_path), psutil.Process(), [], []
    for w in held.values():
        backends.append(KernelBackend("AMXInt8", w, shape, threads=2, max_len=32, packed=there.find(w)))
        gc.collect()
        used.append(process.memory_full_info().uss / 2**20)
    assert 20 < used[2] - used[0] < 30  # two layers


@pytest.mark.parametrize("form", ["stacked", "listed", "fp32"])
def test_weights_are_known_however_they_are_held(packed, form):
    w = weights(seed=1)
    if form == "listed":
        w = chosen(w, range(4))
    if form == "fp32":
        w = dataclasses.replace(w, **{f.name: getattr(w, f.name).float() for f in dataclasses.fields(w)})
    assert PackedModel(packed).find(w).module == KEY.format(1)


def load(path, seed=1, shape=SMALL, **options):
    return MoEExperts(weights(shape, seed), top_k=2, r=4, lora_alpha=8, config=int8(path, **options))


def flipped(folder):
    file = next(folder.glob("_layer_1/_numa_0/INT8_up_2_*_quant_.kt"))
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)


def flipped_scale(folder):
    file = next(folder.glob("_layer_1/_numa_0/INT8_down_0_*_scale_.kt"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def truncated(folder):
    file = next(folder.glob("_layer_1/_numa_0/INT8_gate_3_*_quant_.kt"))
    file.write_bytes(file.read_bytes()[:-1])


def longer(folder):
    file = next(folder.glob("_layer_1/_numa_0/INT8_gate_3_*_quant_.kt"))
    file.write_bytes(file.read_bytes() + b"\0")


def missing(folder):
    next(folder.glob("_layer_1/_numa_0/INT8_gate_3_*_scale_.kt")).unlink()


def no_listing(folder):
    (folder / "_layer_1/files.json").unlink()


def other_listing(folder):
    shutil.copy(folder / "_layer_2/files.json", folder / "_layer_1/files.json")


def other_layer(folder):
    """Whole in itself, and in the wrong place."""
    shutil.rmtree(folder / "_layer_1")
    shutil.copytree(folder / "_layer_2", folder / "_layer_1")


def no_layer(folder):
    shutil.rmtree(folder / "_layer_1")


def manifest(change):
    def edit(folder):
        content = json.loads((folder / "manifest.json").read_text())
        change(content)
        (folder / "manifest.json").write_text(json.dumps(content))

    return edit


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (flipped, r"_layer_1/_numa_0/INT8_up_2_4096Byte_quant_.kt: damaged: its SHA-256"),
        (flipped_scale, r"INT8_down_0_256Byte_scale_.kt: damaged: its SHA-256"),
        (truncated, "INT8_gate_3_4096Byte_quant_.kt: 4095 bytes, expected 4096"),
        (longer, "INT8_gate_3_4096Byte_quant_.kt: 4097 bytes, expected 4096"),
        (missing, "INT8_gate_3_256Byte_scale_.kt: cannot be read"),
        (no_listing, "_layer_1/files.json: cannot be read"),
        (other_listing, "_layer_1/files.json: its SHA-256 is not the one in manifest.json"),
        (other_layer, "_layer_1/files.json: its SHA-256 is not the one in manifest.json"),
        (no_layer, "_layer_1/files.json: cannot be read"),
        (manifest(lambda m: m["layers"].pop(1)), "none of the 2 layers in .* was packed from this model's weights"),
        (manifest(lambda m: m["recipe"].update(kt_kernel="0.7.1")), "packed by kt-kernel 0.7.1; installed is"),
        (manifest(lambda m: m["recipe"].update(format=0)), "manifest.json: of format 0; expected 1"),
        (manifest(lambda m: m.pop("recipe")), "manifest.json: not written by `ktmoe quantize`"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json: not written by"),
        (lambda folder: (folder / "manifest.json").unlink(), "no manifest.json, which is written when all"),
    ],
)
def test_what_is_damaged_is_refused_before_the_kernel_sees_it(folder, damage, said, monkeypatch):
    load(folder).close()
    damage(folder)
    monkeypatch.setattr(Host, "run", lambda *args: pytest.fail("the kernel ran"))
    with pytest.raises(KTError, match=said) as refused:
        load(folder)
    assert "ktmoe quantize MODEL" in str(refused.value)


@pytest.mark.parametrize(
    ("damage", "made"), [(flipped, 1), (missing, 1), (no_layer, 1), (no_listing, 1), (lambda folder: None, 0)]
)
def test_the_remedy_makes_what_is_damaged_and_nothing_else(folder, damage, made):
    before = {f: f.read_bytes() for f in folder.rglob("*") if f.is_file()}
    there = {f: f.stat().st_ino for f in folder.rglob("files.json")}
    damage(folder)
    pack(layers(), folder, "drawn", threads=2)
    assert {f: f.read_bytes() for f in folder.rglob("*") if f.is_file()} == before
    assert [f.parent.name for f, inode in there.items() if f.stat().st_ino != inode] == ["_layer_1"] * made
    load(folder).close()


def test_a_checkpoint_is_no_packed_folder(tmp_path):
    """As `ktmoe quantize --format int4` writes one, which is for `model_name_or_path`."""
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(
        KTError, match=r"is a checkpoint.* Name it in model_name_or_path, and leave kt_weight_path out"
    ):
        load(tmp_path)


def test_other_weights_of_the_same_sizes(packed, monkeypatch):
    monkeypatch.setattr("ktmoe.gate.gate._run_gate", lambda *args: pytest.fail("refused too late"))
    with pytest.raises(KTError, match=r"none of the 3 layers.*they are of drawn"):
        load(packed, seed=7)


def test_other_sizes(packed):
    with pytest.raises(KTError, match=r"E, H, I = \(4, 64, 64\); the model's are \(3, 128, 256\).*another model"):
        load(packed, shape=WIDE)


def test_packed_for_other_parts(tmp_path, monkeypatch):
    pack(layers(WIDE, 2), tmp_path, "drawn", tp=2, threads=2)
    with pytest.raises(KTError, match=r"packed for 2 parts .* make 1.*ktmoe quantize MODEL OUT\."):
        load(tmp_path, shape=WIDE)
    monkeypatch.setattr("ktmoe.planning.numa_nodes", lambda: [0, 1])
    load(tmp_path, shape=WIDE, kt_tp_enabled=True).close()
    monkeypatch.setattr("ktmoe.planning.numa_nodes", lambda: [0, 1, 2, 3])
    with pytest.raises(KTError, match=r"packed for 2 parts .* make 4.*--tp 4"):
        load(tmp_path, shape=WIDE, kt_tp_enabled=True)


def test_a_certificate_of_the_gate_does_not_depend_on_the_folder(packed):
    assert plan(int8(packed), SMALL) == plan(int8(), SMALL)


def test_the_load_probe_still_finds_a_swapped_expert(packed, tmp_path):
    """What was packed wrongly has the right hashes."""
    swapped = dataclasses.replace(weights(seed=1), up_proj=weights(seed=1).up_proj[[0, 2, 1, 3]])
    pack({KEY.format(1): swapped}, tmp_path, "swapped", threads=2)
    manifest(lambda m: m["layers"][0].update(weights=PackedModel(packed).layers[1].weights))(tmp_path)
    with pytest.raises(ktmoe.KernelError, match="output of expert 1: relative error"):
        load(tmp_path)


def test_without_a_kernel(packed, monkeypatch):
    monkeypatch.setattr("ktmoe.backends.kt.extension._extension", lambda: (None, "no CPU for it"))
    decided = plan(int8(packed), SMALL)
    assert decided.backend == "torch"
    assert "kt_weight_path is of no use" in decided.note
    assert find_packed(decided, weights(), int8(packed)) is None
    assert build(decided, weights(), SMALL, 1.0).name == "torch"
    with pytest.raises(KTError, match="ktmoe quantize: the kernel itself packs"):
        pack(layers(), packed, "drawn")


def python(program, code=0, **environment):
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, **environment})
    assert done.returncode == code, done.stderr
    return done


def test_a_killed_run_is_resumed(packed, tmp_path):
    out = tmp_path / "out"
    killed = f"""
        import os, signal
        from pathlib import Path
        from ktmoe.convert import quantize
        from helpers import weights
        real = quantize._hashes
        def hashes(layer):  # the third layer's files are written, but not yet in their place
            if len(list(Path({str(out)!r}).glob("_layer_*"))) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(layer)
        quantize._hashes = hashes
        layers = {{{KEY!r}.format(n): weights(seed=n) for n in range(3)}}
        quantize.pack(layers, Path({str(out)!r}), "drawn", threads=2)
    """
    python(killed, code=-signal.SIGKILL)
    assert sorted(f.name for f in out.iterdir()) == [".part", "_layer_0", "_layer_1"]
    assert list((out / ".part").rglob("*.kt"))
    with pytest.raises(KTError, match=r"no manifest\.json, which is written when all layers are packed"):
        load(out)
    kept = {f: f.stat().st_mtime_ns for n in range(2) for f in (out / f"_layer_{n}").rglob("*")}
    pack(layers(), out, "drawn", threads=2)
    assert {f: f.stat().st_mtime_ns for f in kept} == kept
    names = {f.relative_to(packed) for f in packed.rglob("*")}
    assert {f.relative_to(out) for f in out.rglob("*")} == names
    assert all((out / f).read_bytes() == (packed / f).read_bytes() for f in names if (packed / f).is_file())


def test_a_full_disk_is_noticed(tmp_path):
    """The kernel goes on when a write fails."""
    held, (soft, hard) = layers(WIDE, 1), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(KTError, match=r"bytes, expected 32768\. Is the disk full\?"):
            pack(held, tmp_path, "drawn", threads=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_too_little_space_is_said_before(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 1000))
    with pytest.raises(KTError, match=r"1e-06 GB are free; the packed weights take .* GB more"):
        pack(layers(), tmp_path / "out", "drawn", threads=2)


@pytest.mark.parametrize("what", ["other weights", "other parts", "other files", "a file", "another run"])
def test_folders_that_hold_something_else(folder, what):
    held, tp, said = layers(), 1, ""
    if what == "other weights":
        held, said = {KEY.format(1): weights(seed=7)}, r"_layer_1: packed from other weights.*delete"
    elif what == "other parts":
        pack(layers(WIDE), folder / "_layer_9", "drawn")
        folder, held, tp, said = folder / "_layer_9", layers(WIDE), 2, r"tp=1\), not Recipe.*tp=2\)"
    elif what == "other files":
        (folder / "model.safetensors").touch()
        said = "holds model.safetensors, which is no packed weights"
    elif what == "a file":
        folder, said = folder / "manifest.json", "cannot be written"
    before = {f: f.stat().st_mtime_ns for f in folder.rglob("*.kt")}
    if what == "another run":
        other = os.open(folder, os.O_RDONLY)
        fcntl.flock(other, fcntl.LOCK_EX)
        said = "another ktmoe quantize is writing there"
    with pytest.raises(KTError, match=said):
        pack(held, folder, "drawn", tp)
    assert {f: f.stat().st_mtime_ns for f in folder.rglob("*.kt")} == before
    if what == "another run":
        os.close(other)
        pack(held, folder, "drawn")


def test_layers_that_look_alike(tmp_path):
    """Weights say which layer they are; those that cannot are not packed."""
    one = weights(seed=1)
    other = dataclasses.replace(one, up_proj=one.up_proj.clone())
    other.up_proj[0, 0] += 1  # not in the sample
    with pytest.raises(KTError, match=r"layers\.1.* and .*layers\.0.* have different weights that look alike"):
        pack({KEY.format(0): one, KEY.format(1): other}, tmp_path / "other", "drawn", threads=2)
    pack({KEY.format(0): one, KEY.format(1): one}, tmp_path / "same", "drawn", threads=2)
    load(tmp_path / "same").close()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny bf16 Qwen3-MoE and its packed experts."""
    path = tmp_path_factory.mktemp("model")
    model(dtype=torch.bfloat16).save_pretrained(path / "model", max_shard_size="100KB")
    quantize_model(path / "model", path / "packed", threads=2)
    return path


def trained(loaded):
    """Logits, and every gradient of a step."""
    moved(loaded).train()
    out = loaded(IDS, labels=IDS)
    out.loss.backward()
    return [out.logits.detach(), *(p.grad for p in loaded.parameters() if p.requires_grad)]


@pytest.mark.parametrize("share_backward", ["on", "off"])
def test_a_model_end_to_end(checkpoint, share_backward):
    options = dict(kt_share_backward=share_backward)
    adapter = dict(lora=lora("q_proj", "experts"))
    found = trained(ktmoe.load_model(checkpoint / "model", int8(checkpoint / "packed", **options), **adapter))
    online = trained(ktmoe.load_model(checkpoint / "model", int8(**options), **adapter))
    assert len(found) > 10
    assert all(torch.equal(a, b) for a, b in zip(found, online, strict=True))


def test_a_model_that_is_in_memory(checkpoint):
    stock = AutoModelForCausalLM.from_pretrained(checkpoint / "model", dtype=torch.bfloat16)
    attached = attach(stock, int8(checkpoint / "packed"), r=4)
    streamed = ktmoe.load_model(checkpoint / "model", int8(checkpoint / "packed"), r=4)
    assert torch.equal(logits(attached), logits(streamed))


def test_another_model_is_refused_and_stays_as_it_was(checkpoint):
    other = model(dtype=torch.bfloat16)
    for p in other.parameters():
        p.data.mul_(1.01)
    expected = logits(other)
    with pytest.raises(KTError, match=r"none of the 3 layers in .*packed was packed from this model's weights"):
        attach(other, int8(checkpoint / "packed"), r=4)
    assert not moe_layers(other)
    assert torch.equal(logits(other), expected)


def test_fp8_checkpoints_and_layers_that_do_not_start_at_zero(tmp_path):
    """As DeepSeek-V3 is released: the first layer is dense."""
    sizes = dict(moe_intermediate_size=64, intermediate_size=96, q_lora_rank=None)  # whole blocks of scales
    model("DeepSeek-V3", torch.bfloat16, **sizes).save_pretrained(tmp_path / "model", max_shard_size="100KB")
    as_fp8(tmp_path / "model")
    quantize_model(tmp_path / "model", tmp_path / "packed", threads=2)
    assert sorted(f.name for f in (tmp_path / "packed").glob("_layer_*")) == ["_layer_1", "_layer_2"]
    a, b = (ktmoe.load_model(tmp_path / "model", int8(path), r=4) for path in (tmp_path / "packed", None))
    assert torch.equal(logits(a), logits(b))
    stack = next(iter(moe_layers(a).values())).weights.up_proj
    assert all(torch.equal(stack.row(e, n), stack[e][n]) for e in (0, 3) for n in (0, 31, 32, 63))


def test_the_amx_binary_packs_the_same_bytes(packed, tmp_path):
    """A folder serves both kinds of CPU. AMX is emulated where the CPU has none."""
    if amx.missing():
        pytest.skip(f"AMX NOT verified on this host: {amx.missing()}")
    program = f"""
        from pathlib import Path
        from helpers import weights
        from ktmoe.backends import kt
        from ktmoe.convert.quantize import pack
        layers = {{{KEY!r}.format(n): weights(seed=n) for n in range(3)}}
        pack(layers, Path({str(tmp_path / "amx")!r}), "drawn", threads=2)
        print(kt.variant())
    """
    done = python(program, **amx.environment(amx.library(tmp_path)))
    assert done.stdout == "amx\n"
    files = [f for f in packed.glob("_layer_*/**/*") if f.is_file()]
    assert len(files) == 3 * (4 * 3 * 2 + 1)
    assert all((tmp_path / "amx" / f.relative_to(packed)).read_bytes() == f.read_bytes() for f in files)


@pytest.mark.slow
def test_llamafactory_trains_with_it(tmp_path):
    """Stock LLaMA-Factory, with the losses of weights quantised while loading."""
    llamafactory = pytest.importorskip("test_llamafactory")
    workspace = llamafactory.Workspace(tmp_path)
    quantize_model(workspace.model, tmp_path / "packed", threads=2)
    keys = dict(kt_backend="AMXInt8", kt_num_threads=1, kt_max_len=256)
    found, _ = workspace.train("from_disk", kt_weight_path=str(tmp_path / "packed"), **keys)
    assert len(found) == llamafactory.STEPS
    assert found == workspace.train("online", **keys)[0]


def test_the_command(checkpoint, tmp_path):
    command = [sys.executable, "-m", "ktmoe.cli", "quantize", checkpoint / "model", tmp_path / "out", "--threads", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "3 layers, 0.000157 GB" in done.stdout
    assert f"kt_backend: AMXInt8\nkt_weight_path: {tmp_path / 'out'}" in done.stdout
    assert "Packing experts: 100%" in done.stderr
    content = json.loads((tmp_path / "out/manifest.json").read_text())
    assert content["model"] == str(checkpoint / "model")
    assert content["ktmoe"] == ktmoe.__version__
    assert content["variant"] == kernel_module.variant()
    assert content["recipe"] == {"format": 1, "kt_kernel": kernel_module.version(), "tp": 1}


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("nowhere", "out"), "nowhere"),
        (("MODEL", "MODEL"), "which is no packed weights"),
        (("MODEL", "out", "--tp", "2"), "tensor parallelism: got 2 parts; I = 64 divides into 1 for AMXInt8"),
        (("MODEL", "out", "--tp", "5"), "--tp"),
        (("MODEL",), "out"),
    ],
)
def test_mistakes_on_the_command_line(checkpoint, tmp_path, args, said):
    known = {"MODEL": str(checkpoint / "model"), "out": str(tmp_path / "out")}
    done = CliRunner().invoke(app, ["quantize", *(known.get(a, a) for a in args)])
    assert done.exit_code == 2
    assert said in done.stderr
    assert not list(tmp_path.glob("out/*"))
