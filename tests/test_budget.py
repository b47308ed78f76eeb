"""What fits into memory, known before a weight is read: sizes, the refusal with its remedy, and `ktmoe plan`."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import families
import peft
import pytest
import torch
import transformers
from typer.testing import CliRunner

import ktmoe
from ktmoe import KTConfig, KTError, budget, devices, llamafactory, room
from ktmoe.backends import KERNEL_BACKENDS, TABLE, Plan
from ktmoe.budget import Batch, dry_step, prediction
from ktmoe.cli import app
from ktmoe.gate import Speed
from ktmoe.processes import on_this_host
from ktmoe.shapes import SHAPES


CONFIG = transformers.Qwen3MoeConfig(
    hidden_size=64, moe_intermediate_size=128, num_hidden_layers=3, mlp_only_layers=[0], intermediate_size=64,
    num_attention_heads=2, num_key_value_heads=2, head_dim=32, vocab_size=64, num_experts=4, num_experts_per_tok=2,
)  # fmt: skip
WEIGHTS = 2 * 4 * 3 * 64 * 128  # of two layers


@pytest.fixture
def folder(tmp_path):
    CONFIG.save_pretrained(tmp_path)
    return str(tmp_path)


@pytest.fixture
def free(monkeypatch):
    """How much memory there seems to be."""

    def set_to(size):
        monkeypatch.setattr(room, "free_memory", lambda: size)
        monkeypatch.setattr("ktmoe.budget.budget.free_memory", lambda: size)

    return set_to


@pytest.fixture
def kernel_is_there(monkeypatch):
    for name, row in list(TABLE.items()):
        monkeypatch.setitem(TABLE, name, dataclasses.replace(row, refuse_host=lambda: ""))


BATCH = Batch(1, 16)


def make(folder, rank=4, batch=BATCH, keys=None, **lora):
    config = transformers.AutoConfig.from_pretrained(folder)
    lora = peft.LoraConfig(r=rank, task_type="CAUSAL_LM", **({"target_modules": "all-linear"} | lora))
    return budget.make(config, lora, batch, KTConfig(**(keys or {})))


def size(found, name):
    (part,) = [p.size for p in (*found.host, *found.device) if p.name.startswith(name)]
    return part


@pytest.mark.parametrize("targets", ["all-linear", ["experts"], ["q_proj", "v_proj"]])
def test_sizes_are_those_of_the_model(folder, targets):
    found = make(folder, target_modules=targets)
    assert list(found.layers.values()) == [2]
    ways = (*found.ways, *found.others)
    by_keys = {room.as_keys(way.keys): way.size / WEIGHTS for way in ways}  # two layers: half of a pair is one layer
    assert by_keys == {
        "kt_backend: AMXBF16, kt_share_backward: off": 4,
        "kt_backend: AMXBF16, kt_share_backward: on": 3,
        "kt_backend: AMXInt8, kt_share_backward: on": 1.5,
        "kt_backend: torch, kt_torch_packing: both": 4,
        "kt_backend: torch, kt_torch_packing: forward": 2,
        "kt_backend: torch, kt_torch_packing: off": 0,
    }
    model = transformers.Qwen3MoeForCausalLM(CONFIG).bfloat16()
    adapter = peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM")
    attached = ktmoe.attach(model, KTConfig(kt_backend="reference"), lora=adapter)
    lora = {n: p.numel() for n, p in attached.named_parameters() if p.requires_grad}
    experts = sum(count for name, count in lora.items() if ".experts." in name)
    assert size(found, "LoRA of the routed experts") == 16 * experts
    assert size(found, "its LoRA") == 16 * (sum(lora.values()) - experts)
    rest = sum(p.nbytes for p in attached.parameters() if not p.requires_grad)
    rest += sum(b.nbytes for b in attached.buffers())
    assert size(found, "everything but the routed experts") == rest


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("family", ["Qwen3-MoE", "Mixtral", "DeepSeek-V2", "DeepSeek-V3"])
def test_activations_are_those_of_a_step(family, checkpointing, monkeypatch):
    """The same step of the attached model on real tensors; its experts are replaced, as they are another part."""
    elsewhere = dry_step._Run.apply
    monkeypatch.setattr(
        "ktmoe.experts.MoEExperts.run", lambda self, x, index, w, lora: elsewhere(x, w, next(iter(lora)))
    )
    config = families.config(family)
    lora = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    batch = Batch(2, 128, checkpointing)
    planned = budget.make(config, lora, batch)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model = ktmoe.attach(model, KTConfig(kt_backend="reference", kt_cpu_activation="recompute"), lora=lora)
    measured = real_peak(model, batch)
    assert size(planned, "its activations") == pytest.approx(measured, rel=0.1)


def test_the_meter_counts_what_is_made_and_lives():
    there = torch.zeros(1000)
    with dry_step.Meter([there]) as meter:
        turned = there.view(10, 100).t()  # of memory that was there before
        first = turned + 1
        second = first * 2
        del second
        third = first * 3
    assert (meter.peak, meter.live) == (8000, 8000)
    del third


def real_peak(model, batch):
    """Most bytes of tensors that live at once in a step, the routed experts' own left out."""
    model.train()
    if batch.checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.zeros(batch.sequences, batch.length, dtype=torch.long)
    mask = torch.ones_like(ids)
    mask[0, 0] = 0  # as in a batch with padding: transformers makes a mask for attention then
    own = [p for n, p in model.named_parameters() if p.requires_grad and ".experts." not in n]
    with dry_step.Meter([*model.parameters(), *model.buffers()]) as meter:
        with torch.autocast("cpu", torch.bfloat16):
            out = model(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False)
        logits, loss = out.logits.float(), out.loss
        del out, logits
        loss.backward()
    return meter.peak - sum(p.nbytes for p in own)


@pytest.mark.parametrize(
    ("memory", "best"),
    [
        (5, "kt_backend: AMXBF16, kt_share_backward: off"),
        (3.5, "kt_backend: AMXBF16, kt_share_backward: on"),
        (1, "kt_backend: torch, kt_torch_packing: off"),
    ],
)
def test_the_fastest_way_that_fits(folder, free, kernel_is_there, memory, best):
    found = make(folder)
    beside = found.on_host(found.ways[0]) - found.ways[0].size
    free(int(memory * WEIGHTS) + beside)
    assert room.as_keys(make(folder).best.keys) == best


def test_ways_are_those_that_the_keys_allow(folder, free, kernel_is_there):
    named = make(folder, keys={"kt_backend": "AMXInt8"})
    assert [room.as_keys(way.keys) for way in named.ways] == ["kt_backend: AMXInt8, kt_share_backward: on"]
    free(named.on_host(named.ways[0]) - 1)
    short = make(folder, keys={"kt_backend": "AMXInt8"})
    assert short.best is None
    assert "kt_backend: torch, kt_torch_packing: off" in budget.remedy(short)


@pytest.mark.parametrize(
    ("keys", "backend"),
    [
        ({"kt_backend": "AMXBF16"}, "torch"),  # not on this host: torch takes over, and that is what is planned
        ({"kt_backend": "reference"}, "reference"),
        ({"kt_backend": "torch"}, "torch"),
        ({}, "torch"),
    ],
)
def test_what_is_planned_is_what_would_run(folder, monkeypatch, keys, backend):
    for name in KERNEL_BACKENDS:
        monkeypatch.setitem(TABLE, name, dataclasses.replace(TABLE[name], refuse_host=lambda: "not here"))
    found = make(folder, keys=keys)
    assert found.planned.keys["kt_backend"] == backend
    assert "no backend" not in budget.sentence(found)


def test_int8_with_copies_of_each_layers_own(folder, kernel_is_there):
    found = make(folder, keys={"kt_backend": "AMXInt8", "kt_share_backward": "off"})
    assert found.planned.size == 2 * WEIGHTS


def test_the_rest_in_4_bits(folder):
    config = transformers.AutoConfig.from_pretrained(folder)
    for targets in ("all-linear", ["q_proj"]):
        lora = peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM")
        half, quarter = (budget.make(config, lora, BATCH, bits=bits) for bits in (8, 4))
        whole = make(folder, target_modules=targets)
        saved = [size(whole, "everything but") - size(found, "everything but") for found in (half, quarter)]
        model = transformers.Qwen3MoeForCausalLM(CONFIG)
        others = [m for n, m in model.named_modules() if ".experts." not in n and m is not model.lm_head]
        linear = [m for m in others if type(m) is torch.nn.Linear]
        assert saved == [sum(m.weight.numel() for m in linear), sum(m.weight.numel() for m in linear) * 3 // 2]


@pytest.mark.parametrize("checkpointing", [True, False])
def test_many_layers_are_what_some_of_them_say(folder, monkeypatch, checkpointing):
    """Memory and operations are linear in the layers, so that sixty of them need not be run."""
    config = transformers.AutoConfig.from_pretrained(folder)
    config.num_hidden_layers = 11
    config.save_pretrained(folder)
    quick = make(folder, batch=Batch(1, 64, checkpointing))
    operations = quick.operations()
    monkeypatch.setattr(dry_step, "_FEW", (100, 200))
    whole = make(folder, batch=Batch(1, 64, checkpointing))
    assert size(quick, "its activations") == size(whole, "its activations")
    assert operations == whole.operations()


def test_what_is_retained_and_what_checkpointing_saves(folder):
    kept = make(folder, batch=Batch(1, 256, False))
    less = make(folder, batch=Batch(1, 256, True), keys={"kt_cpu_activation": "recompute"})
    assert size(less, "its activations") < size(kept, "its activations")
    assert len(less.host) < len(kept.host)
    torch_kept, torch_less = (next(w for w in found.ways if w.keys["kt_backend"] == "torch") for found in (kept, less))
    assert torch_less.activations < torch_kept.activations


def test_processes_have_batches_and_lora_of_their_own_and_the_experts_once(folder):
    one, three = (budget.of_model(folder, 4, 1, 16, processes=n) for n in (1, 3))
    for name in ("everything but", "its LoRA", "its activations", "LoRA of the routed", "inputs and outputs"):
        assert size(three, name) == 3 * size(one, name)
    for a, b in zip(one.ways, three.ways, strict=True):
        if a.keys["kt_backend"] == "torch":
            assert b.size == a.size
            assert b.activations > a.activations
        else:  # and room for calls with the rows of all
            assert a.size < b.size < 2 * a.size or a.size == b.size


def test_a_launchers_processes_are_counted(folder, monkeypatch):
    runner = CliRunner().invoke(app, ["plan", folder, "--processes", "2", "--json"])
    assert json.loads(runner.stdout)["processes"] == 2
    shown = CliRunner().invoke(app, ["plan", folder, "--processes", "2"]).stdout
    assert "2 processes on this host, with a batch; one has the experts" in shown
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert on_this_host() == 4
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert on_this_host() == 1


def a_gpu(monkeypatch, free):
    monkeypatch.setattr(devices, "accelerator", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(devices, "free", lambda device: free)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")


def test_experts_on_a_gpu_are_in_its_budget_and_not_in_the_hosts(folder, monkeypatch):
    a_gpu(monkeypatch, 10**9)
    whole, split = make(folder), make(folder, keys={"kt_num_gpu_experts": 1})
    for a, b in zip(whole.ways, split.ways, strict=True):
        if a.keys["kt_backend"] == "AMXBF16":
            assert b.size == pytest.approx(a.size * 3 / 4, rel=0.05)  # the backward's shared buffer is one layer's
    there = 2 * WEIGHTS / 4  # in bf16
    assert size(split, "1 routed experts of each layer, in bf16") == there
    assert split.of_device(certain=True) == whole.of_device(certain=True) + there
    assert split.of_device() > whole.of_device() + there


def test_a_gpu_has_a_budget_of_its_own(folder, monkeypatch):
    a_gpu(monkeypatch, 1000)
    found = make(folder)
    assert (found.free_device, found.device_name) == (1000, "a GPU")
    assert found.best is None
    assert found.of_device() == sum(part.size for part in found.device)
    assert found.on_host(found.ways[-1]) == found.ways[-1].size + found.ways[-1].activations + sum(
        part.size for part in found.host
    )
    assert "cutoff_len" in budget.remedy(found)


@pytest.mark.parametrize(
    ("keys", "fits", "refused"),
    [
        ({"kt_backend": "AMXBF16", "kt_share_backward": "off"}, 4, 3.9),
        ({"kt_backend": "AMXBF16", "kt_share_backward": "on"}, 3, 2.9),
        ({"kt_backend": "AMXInt8", "kt_share_backward": "on"}, 1.5, 1.4),
        ({"kt_backend": "torch", "kt_torch_packing": "off"}, 0, None),
        ({"kt_backend": "torch"}, 0, None),
        ({"kt_backend": "reference"}, 0, None),
        ({"kt_backend": "AMXInt8", "kt_plan": "off"}, 0, None),
    ],
)
def test_what_cannot_fit_is_refused_with_what_does(free, kernel_is_there, keys, fits, refused):
    shapes = [dataclasses.replace(shape, rank=4) for shape in [ktmoe.types.MoEShape(4, 64, 128, 2, 4)] * 2]
    free(int(fits * WEIGHTS))
    room.check_room(KTConfig(**keys), shapes)
    if refused:
        free(int(refused * WEIGHTS))
        with pytest.raises(
            KTError, match=r"the routed experts take .* GB of memory, and .* GB are free.*What fits: kt_b"
        ):
            room.check_room(KTConfig(**keys), shapes)


@pytest.mark.parametrize("name", ["load_model", "attach"])
def test_nothing_is_loaded_that_cannot_fit(name, tmp_path, free, kernel_is_there, monkeypatch):
    model = transformers.Qwen3MoeForCausalLM(CONFIG).bfloat16()
    before = {n: p.clone() for n, p in model.state_dict().items()}
    model.save_pretrained(tmp_path)
    monkeypatch.setattr("ktmoe.experts.MoEExperts.load", lambda *args: pytest.fail("a layer was loaded"))
    monkeypatch.setattr(
        transformers.AutoModelForCausalLM, "from_pretrained", lambda *args, **kwargs: pytest.fail("a file was read")
    )
    free(int(1.4 * WEIGHTS))
    config = KTConfig(kt_backend="AMXInt8", kt_num_threads=1)
    with pytest.raises(KTError, match="kt_backend: torch, kt_torch_packing: off"):
        ktmoe.load_model(tmp_path, config, r=4) if name == "load_model" else ktmoe.attach(model, config, r=4)
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())


def test_a_model_that_asks_for_numbers_is_no_traceback(folder, monkeypatch):
    """Code of a hub's model may be anything."""
    forward = transformers.models.qwen3_moe.modeling_qwen3_moe.Qwen3MoeAttention.forward

    def asks(self, hidden_states, *args, **kwargs):
        assert bool(hidden_states.sum() == 0)
        return forward(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(transformers.models.qwen3_moe.modeling_qwen3_moe.Qwen3MoeAttention, "forward", asks)
    with pytest.raises(budget.CannotCount, match="does not run on tensors without numbers"):
        make(folder)


def test_the_command(folder, free):
    free(10**9)
    done = CliRunner().invoke(app, ["plan", folder, "--json", "--length", "64"])
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["batch"] == {"sequences": 1, "length": 64, "checkpointing": True}
    (off,) = [w for w in found["ways"] if w["keys"] == {"kt_backend": "torch", "kt_torch_packing": "off"}]
    assert (off["bytes"], off["fits"], off["why_not"]) == (0, True, "")
    shown = CliRunner().invoke(app, ["plan", folder, "--length", "64"])
    assert "2 layers of 4 routed experts, 64 x 128, 2 for each token" in shown.stdout
    assert "the fastest way that fits" in shown.stdout
    free(1)  # not even the LoRA
    assert CliRunner().invoke(app, ["plan", folder]).exit_code == 1
    assert CliRunner().invoke(app, ["plan", folder + "/nowhere"]).exit_code == 2
    assert CliRunner().invoke(app, ["plan", folder, "kt_backend=torch"]).exit_code == 2


def test_the_command_with_a_configuration(tmp_path):
    factory = pytest.importorskip("factory")
    folder = str(tmp_path / "model")
    config = tmp_path / "run.yaml"
    factory.save_model(folder)
    config.write_text(
        f"use_kt: true\nkt_backend: torch\nmodel_name_or_path: {folder}\nstage: dpo\ndo_train: true\n"
        "dataset: dpo_en_demo\ntemplate: default\nfinetuning_type: lora\nlora_rank: 4\ncutoff_len: 32\n"
        f"per_device_train_batch_size: 3\noutput_dir: {tmp_path}/out\nuse_cpu: true\nbf16: true\n"
    )
    command = [sys.executable, "-m", "ktmoe.cli", "plan", str(config)]
    done = subprocess.run([*command, "--json", "cutoff_len=16"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)  # and nothing else
    assert found["batch"] == {"sequences": 6, "length": 16, "checkpointing": True}
    for option in (["--rank", "4"], ["--trust-remote-code"]):
        refused = CliRunner().invoke(app, ["plan", str(config), *option])
        assert (refused.exit_code, f"ktmoe: {option[0]}" in refused.stderr) == (2, True), refused.stderr


@pytest.fixture
def training(folder, monkeypatch):
    """`check_budget` of a training whose budget is that of the small model; gives what is logged."""
    foresight = pytest.importorskip("ktmoe.llamafactory.foresight")
    said = []
    logger = SimpleNamespace(info_rank0=said.append, warning_rank0=said.append)
    monkeypatch.setattr(foresight, "logger", lambda: logger)
    monkeypatch.setattr(foresight, "budget_of", lambda *args: make(folder, keys={"kt_backend": "torch"}))

    def check(kt_plan="on", do_train=True):
        said.clear()
        foresight.check_budget(SimpleNamespace(kt_plan=kt_plan), None, SimpleNamespace(do_train=do_train), None)
        return said

    return check


def test_a_training_is_refused_if_no_batch_could_fit(folder, free, training):
    found = make(folder, keys={"kt_backend": "torch"})
    smallest = found.ways[-1]
    free(10**9)
    (said,) = training()
    assert "ktmoe: at most" in said
    free(found.on_host(smallest) - 1)
    _, said = training()
    assert "a batch of 1 x 16 tokens, as long as cutoff_len allows, would not fit. What takes less: " in said
    free(found.on_host(smallest, certain=True) - 1)
    with pytest.raises(KTError, match=r"kt_plan: weights, LoRA and optimizer alone take .* kt_plan: off goes on"):
        training()
    assert training(kt_plan="off") == training(do_train=False) == []


def test_a_training_that_cannot_be_counted_goes_on(monkeypatch, training):
    def cannot(*args):
        raise budget.CannotCount("its code is odd.")

    monkeypatch.setattr("ktmoe.llamafactory.foresight.budget_of", cannot)
    assert training() == ["ktmoe: memory was not looked at before loading. its code is odd."]


def test_a_training_is_planned_before_it_is_loaded(tmp_path, monkeypatch):
    """Wired into what `ktmoe train` and `ktmoe check` parse."""
    factory = pytest.importorskip("factory")
    factory.save_model(tmp_path / "model")

    def planned(*args, processes, **kwargs):
        pytest.fail(f"was planned for {processes}")

    monkeypatch.setattr("ktmoe.llamafactory.foresight.make", planned)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")  # as torchrun sets it
    argv = ["--use_kt", "--kt_backend", "torch", "--stage", "sft", "--do_train", "--dataset", "identity", "--use_cpu"]
    argv += ["--template", "default", "--model_name_or_path", f"{tmp_path}/model", "--output_dir", f"{tmp_path}/out"]
    with pytest.raises(pytest.fail.Exception, match="was planned for 3"):
        llamafactory.check(argv)
    llamafactory.check([*argv, "--kt_plan", "off"])


def test_a_step_is_predicted_from_what_was_measured(folder, monkeypatch):
    """The arithmetic: experts of all layers, and everything else at the rate of dense products."""
    plan = Plan("torch", None, 1, 4096, True)
    monkeypatch.setattr(prediction, "speed", lambda config, shape, stored, tokens: Speed(plan, 0.5, 1e9))
    found = make(folder)
    predicted = budget.predict(found)
    assert predicted.experts == 2 * 0.5
    assert predicted.rest == found.operations() / 1e9 > 0
    monkeypatch.setattr(prediction, "speed", lambda config, shape, stored, tokens: Speed(plan, tokens / 16, 1e9))
    one, three = (budget.of_model(folder, 4, 1, 16, processes=n) for n in (1, 3))
    assert budget.predict(three).experts == 3 * budget.predict(one).experts == 3 * 2
    assert budget.predict(three).rest == 3 * budget.predict(one).rest
    monkeypatch.setattr(prediction, "speed", lambda config, shape, stored, tokens: Speed(plan, 0.5, 1e9))
    recomputed = make(folder, keys={"kt_cpu_activation": "recompute"})
    assert budget.predict(recomputed).experts == 1.5 * 2 * 0.5


def test_the_documented_table_is_what_the_rows_say():
    """docs/families.md: all layers, as AMXBF16 packs them once."""
    text = (Path(__file__).resolve().parent.parent / "docs" / "families.md").read_text(encoding="utf-8")
    for name, layers in (("DeepSeek-V2-Lite", 26), ("Qwen3-30B-A3B", 48), ("Mixtral-8x7B", 32), ("DeepSeek-V3", 58)):
        size = layers * TABLE["AMXBF16"].memory(Plan("AMXBF16", None, 1, 1, True), SHAPES[name]).each / 1e9
        row = next(line for line in text.splitlines() if line.startswith(f"| {name} |"))
        assert f"| {size:.1f} GB |" in row or f"| {size:.0f} GB |" in row


def test_the_planned_table_is_what_the_rows_say():
    """docs/families.md: the experts of all layers, by format."""
    text = (Path(__file__).resolve().parent.parent / "docs" / "families.md").read_text(encoding="utf-8")
    for name, layers in (("DeepSeek-V2-Lite", 26), ("Qwen3-30B-A3B", 48), ("Mixtral-8x7B", 32), ("DeepSeek-V3", 58)):
        sizes = {room.as_keys(way.keys): way.size / 1e9 for way in room.ways([SHAPES[name]] * layers)}
        lines = [line for line in text.splitlines() if line.startswith(f"| {name} |")]
        written = [float(cell) for cell in lines[1].split("|")[2:6]]
        lora = 16 * layers * sum(torch.Size(s).numel() for s in SHAPES[name].lora_shapes().values()) / 1e9
        expected = [
            sizes["kt_backend: AMXBF16, kt_share_backward: off"],
            sizes["kt_backend: AMXBF16, kt_share_backward: on"],
            sizes["kt_backend: AMXInt8, kt_share_backward: on"],
            lora,
        ]
        assert written == pytest.approx(expected, rel=0.02), name
