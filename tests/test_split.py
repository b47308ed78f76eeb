"""Experts on a device beside the CPU: the same numbers as without, for every backend, and clear refusals."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import ktmoe_reference
import peft
import pytest
import torch
from helpers import BACKENDS, call, draw, exact, limits, relative
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

import ktmoe
from ktmoe import KernelError, KTConfig, KTError, MoEExperts, counts, devices, recording, split
from ktmoe.backends.torch.buffers import Buffers
from ktmoe.backends.torch.lora import ExpertLora
from ktmoe.gate import contract
from ktmoe.types import MoEShape


EIGHT = MoEShape(num_experts=8, hidden_size=128, intermediate_size=128, top_k=2, rank=4)
SOME = [1, 3, 4, 6]
LAYERS, E = 2, 8
CONFIG = Qwen3MoeConfig(
    vocab_size=64, hidden_size=64, num_hidden_layers=LAYERS, num_attention_heads=2, num_key_value_heads=2, head_dim=32,
    intermediate_size=64, moe_intermediate_size=64, num_experts=E, num_experts_per_tok=2,
)  # fmt: skip


@pytest.fixture(autouse=True)
def device(monkeypatch):
    """The CPU stands for one; see `second_device` for tensors that may not meet."""
    monkeypatch.setattr(devices, "accelerator", lambda: torch.device("cpu"))


def layer(name, experts, case=None, **keys):
    case = case or draw(name, EIGHT)
    keys = {"kt_num_gpu_experts": len(experts), "kt_gpu_experts": experts or None, **keys}
    config = KTConfig(kt_backend=name, kt_num_threads=1, **{"kt_verify": "off"} | keys)
    made = MoEExperts(case.weights, top_k=case.shape.top_k, config=config)
    return made, made.load(case.shape.rank, case.lora.scaling), case


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("experts", [SOME, [0, 1, 2, 3], [5, 6, 7, 2]], ids=str)
def test_every_backend_with_some_experts_elsewhere_matches_the_specification(name, experts):
    _, backend, case = layer(name, experts)
    assert isinstance(backend.backend, split.SplitBackend)
    assert backend.backend._cpu.backend.shape.num_experts == 4  # the CPU's memory is that of its own
    rows = contract.measure(case, contract.answer(backend, case), contract.specification(case))
    assert contract.violations(rows, limits(name)) == []


def test_split_equals_unsplit_to_the_rounding_of_fp32():
    case = draw("reference", EIGHT)
    whole, parts = (contract.answer(layer("reference", experts, case)[1], case) for experts in ([], SOME))
    torch.testing.assert_close(parts[0], whole[0], rtol=1e-5, atol=1e-6)
    for a, b in zip(vars(parts[1]).values(), vars(whole[1]).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_parts_have_lora_of_their_own_in_memory():
    """The device may still be reading its own when the CPU's is copied."""
    _, backend, case = layer("torch", SOME)
    inputs = contract._inputs(backend, case)
    parts = (backend.backend._device, backend.backend._cpu)
    first, second = ([t.data_ptr() for t in part.inputs(inputs).lora] for part in parts)
    assert not set(first) & set(second)


@pytest.mark.parametrize("experts", [[7], [0, 1, 2, 3, 4, 5]], ids=str)
def test_tokens_that_are_all_on_one_side(experts):
    """One part of the call is then empty."""
    case = draw("torch", EIGHT)
    made, *_ = layer("torch", experts, case)
    x, _, w = call(made, 6)
    for e in (7, 0):
        index = torch.tensor([[e, -1]]).repeat(6, 1)
        out = made(x, index, w)
        expected = ktmoe_reference.experts_forward(x.double(), index, w.double(), *exact(case.weights))
        assert relative(out, expected) < 0.01
        out.sum().backward()
        assert w.grad[:, 1].eq(0).all()
        w.grad = None


@pytest.mark.parametrize("name", [b for b in BACKENDS if b.values[0] in ("torch", "AMXBF16")])
def test_a_backward_after_another_forward_is_that_of_its_own(name):
    case = draw(name, EIGHT)
    _, backend, _ = layer(name, SOME, case)
    expected = contract.answer(backend, case)[1]
    inputs, other = (contract._inputs(backend, c) for c in (case, contract.first_rows(case, 9)))
    _, ticket = backend.forward(inputs, save=True)
    assert backend.holds(ticket)
    backend.forward(other, save=False)
    assert backend.holds(ticket) is (name == "torch")  # K27: the kernel keeps nothing beside an evaluation
    backend.forward(other, save=True)
    assert not backend.holds(ticket)
    late = backend.backward(ticket, inputs, case.grad_output)
    assert relative(late.hidden_states, expected.hidden_states) < 1e-3
    for a, b in zip(late.lora, expected.lora, strict=True):
        assert relative(a, b) < 2e-3


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_recompute_is_answered_from_what_was_kept(use_reentrant):
    case = draw("torch", EIGHT)
    config = KTConfig(kt_backend="torch", kt_num_gpu_experts=3, kt_cpu_activation="retain")
    made = MoEExperts(case.weights, top_k=2, r=4, config=config)
    ran = []
    for part in (made._backend.backend._cpu, made._backend.backend._device):
        real = part.backend.forward
        part.backend.forward = lambda *args, real=real, **keys: ran.append(1) or real(*args, **keys)
    x, index, w = call(made, 10)
    checkpoint(made, x, index, w, use_reentrant=use_reentrant).sum().backward()
    assert len(ran) == 2  # one forward of each part


def test_what_the_cpu_computed_is_what_its_own_rows_take():
    """The training log compares the CPU's rate with what this machine can do."""
    made, *_ = layer("torch", SOME)
    x, index, w = call(made, 10)
    on_cpu = int(torch.isin(index, torch.tensor([0, 2, 5, 7])).sum())
    with recording.into(record := recording.Record()):
        made(x, index, w).sum().backward()
    assert record.operations == 2 * 6 * on_cpu * EIGHT.hidden_size * EIGHT.intermediate_size > 0
    assert sum(t.sum() for t in record.tokens.values()) == index.numel()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIG, dtype=torch.bfloat16).save_pretrained(folder)
    return str(folder)


def loaded(model, **keys):
    torch.manual_seed(0)
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "experts"], init_lora_weights=False)
    return ktmoe.load_model(model, KTConfig(kt_backend="torch", **keys), lora=lora, dtype=torch.float32)


def test_a_model_trains_saves_and_merges_as_without(model, tmp_path):
    ids = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    found = []
    for keys in ({}, {"kt_num_gpu_experts": 5}):
        tuned = loaded(model, **keys)
        loss = tuned(input_ids=ids, labels=ids).loss
        loss.backward()
        found.append((loss.item(), [p.grad for p in tuned.parameters() if p.grad is not None]))
        tuned.save_pretrained(tmp_path / str(len(keys)))
    (loss, grads), (split_loss, split_grads) = found
    assert split_loss == pytest.approx(loss, rel=2e-3)
    assert all(relative(a, b) < 0.03 for a, b in zip(split_grads, grads, strict=True))
    merged = tuned.merge_and_unload()(input_ids=ids, labels=ids).loss
    assert merged.item() == pytest.approx(split_loss, rel=2e-3)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    stock = peft.PeftModel.from_pretrained(base, tmp_path / "1")
    assert stock(input_ids=ids, labels=ids).loss.item() == pytest.approx(loss, rel=2e-3)


def test_the_experts_with_most_tokens_are_on_the_device(model, tmp_path):
    names = [f"model.layers.{n}.mlp.experts" for n in range(LAYERS)]
    file = tmp_path / "counts.json"
    counts.write(file, {names[0]: [0, 9, 0, 8, 0, 7, 7, 0], names[1]: [1] * E}, model=model)
    tuned = loaded(model, kt_num_gpu_experts=3, kt_gpu_experts=str(file))
    layers = [m for m in tuned.modules() if isinstance(m, MoEExperts)]
    assert [m.on_device for m in layers] == [(1, 3, 5), (0, 1, 2)]


def refused(match, call, *args, **keys):
    with pytest.raises(KTError, match=match):
        call(*args, **keys)


def test_a_file_of_another_model_is_refused_before_anything_is_loaded(model, tmp_path, monkeypatch):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    file = tmp_path / "counts.json"
    keys = {"kt_num_gpu_experts": 3, "kt_gpu_experts": str(file)}
    counts.write(file, {"model.layers.0.mlp.experts": [1] * 4})
    refused("layers.0.mlp.experts has 8 experts here and 4 experts there", loaded, model, **keys)
    counts.write(file, {"model.layers.0.mlp.experts": [1] * E})
    refused("layers.1.mlp.experts has 8 experts here and no such layer there", loaded, model, **keys)
    for damaged in ("{}", "[1]", "{", json.dumps({"tokens_per_expert": {"a": [-1]}}), '{"tokens_per_expert": {}}'):
        file.write_text(damaged)
        refused("counts.json: (holds no counts|not a file that ktmoe calibrate wrote)", loaded, model, **keys)


def test_what_cannot_be_on_the_device_is_refused_before_anything_is_loaded(model, monkeypatch):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    refused("got 7; of 8 experts, 2 for each token, at most 6", loaded, model, kt_num_gpu_experts=7)
    refused("got 8; this model's experts are 0 to 7", loaded, model, kt_num_gpu_experts=1, kt_gpu_experts=[8])
    monkeypatch.setattr(devices, "free", lambda device: 100_000)
    refused(
        "0.000147 GB in bf16, and 0.0001 GB of cpu are free.*Fewer than 3 fit", loaded, model, kt_num_gpu_experts=3
    )
    monkeypatch.setattr(devices, "accelerator", lambda: None)
    refused("kt_num_gpu_experts: got 1; torch sees no GPU here", loaded, model, kt_num_gpu_experts=1)
    refused("torch sees no GPU here", layer, "torch", [0])


def test_a_layer_by_itself_takes_a_list(tmp_path):
    counts.write(tmp_path / "counts.json", {"a": [1] * 8})
    refused("takes a list of ids", layer, "torch", [0], kt_gpu_experts=str(tmp_path / "counts.json"))


@pytest.mark.parametrize("wrong", ["swapped", "scaled", "a matrix"])
def test_a_device_that_computes_something_else_is_refused(monkeypatch, wrong):
    """The load probe, on the experts' own weights."""
    real = split.backend._copied

    def copied(stack, experts, *args):
        found = real(stack, experts, *args)
        if wrong == "swapped":
            return found.flip(0)
        if wrong == "scaled":
            return found * 1.05
        found[2] = found[1]
        return found

    monkeypatch.setattr(split.backend, "_copied", copied)
    with pytest.raises(KernelError, match=r"(?s)kt_num_gpu_experts: experts on cpu do not.*output of expert 2"):
        layer("torch", SOME, kt_verify="quick")
    layer("torch", SOME)  # nobody looks


def test_a_device_whose_gradients_are_wrong_is_refused(monkeypatch):
    """The contract, on drawn weights."""
    real = ExpertLora.add_gradients
    monkeypatch.setattr("ktmoe.gate.on_device._passed", set())
    monkeypatch.setattr(ExpertLora, "add_gradients", lambda self, found, weight: real(self, found, weight * 1.1))
    with pytest.raises(KernelError, match=r"(?s)kt_num_gpu_experts: .*lora_A"):
        layer("torch", SOME, kt_verify="quick")


@pytest.mark.parametrize("where", ["ktmoe.split.backend._copied", "ktmoe.experts.check_on_device"])
def test_a_device_that_is_full_says_so(monkeypatch, where):
    """It may be, although it was not when the model was looked at: for the experts, or while they are checked."""

    def full(*args, **keys):
        raise torch.cuda.OutOfMemoryError("tried to allocate")

    monkeypatch.setattr(where, full)
    refused("kt_num_gpu_experts: got 4; cpu has not the memory", layer, "torch", SOME)


def test_activations_on_a_device_have_a_limit_of_their_own(monkeypatch):
    monkeypatch.setattr(devices, "free", lambda device: 2**15)  # of which half
    buffers, here, elsewhere = Buffers(), torch.device("cpu"), torch.device("meta")
    held = [buffers.borrow(2**14, device) for device in (here, elsewhere)]
    assert None not in held
    assert [buffers.borrow(2**14, device) for device in (here, elsewhere)] == [None, None]


def test_no_tensor_of_the_cpu_meets_one_of_the_device():
    """A whole model on a device of its own, its experts on both: losses as with all on the CPU."""
    script = textwrap.dedent("""
        import peft, torch, transformers
        from second_device import DEVICE, There
        from transformers import AutoModelForCausalLM
        import ktmoe
        from ktmoe import devices
        from test_split import CONFIG

        assert devices.accelerator() == DEVICE and devices.free(DEVICE) == 2**34

        def losses(backend, split, where):
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(CONFIG, dtype=torch.float32, attn_implementation="eager")
            lora = peft.LoraConfig(r=4, target_modules=["q_proj", "experts"], task_type="CAUSAL_LM")
            keys = {"kt_num_gpu_experts": 4, "kt_gpu_experts": [1, 3, 4, 6]} if split else {}
            config = ktmoe.KTConfig(kt_backend=backend, kt_num_threads=1, **keys)
            model = ktmoe.attach(model, config, lora=lora).to(where)
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
            for module in model.modules():
                if split and isinstance(module, ktmoe.MoEExperts):
                    watched(module._backend.backend._device.backend)
            trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
            g = torch.Generator().manual_seed(1)
            for name, p in trained.items():
                assert isinstance(p.data, There) is (".experts." not in name and where == DEVICE), name
                p.data.copy_(torch.randn(p.shape, generator=g) * 0.1)
            ids = torch.randint(0, 64, (2, 11), generator=torch.Generator().manual_seed(1)).to(where)
            optimizer, found = torch.optim.SGD(trained.values(), lr=0.5), []
            for _ in range(3):
                loss = model(input_ids=ids, labels=ids).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                found.append(loss.item())
            return found

        def watched(device):  # what it is given and gives stays there: it may still compute when the CPU begins
            forward, backward = device.forward, device.backward

            def called(inputs, save):
                out, ticket = forward(inputs, save=save)
                there = [inputs.hidden_states, inputs.top_k_index, inputs.top_k_weights, *inputs.lora, out]
                assert all(isinstance(t, There) for t in there)
                return out, ticket

            def back(ticket, inputs, grad):
                found = backward(ticket, inputs, grad)
                assert all(isinstance(t, There) for t in (grad, found.hidden_states, found.top_k_weights, *found.lora))
                return found

            device.forward, device.backward = called, back

        close = {"reference": 1e-5, "torch": 2e-4}
        for backend, near in close.items():
            expected = losses(backend, False, "cpu")
            assert expected[2] < expected[0] - 0.01
            # transformers 4 makes its masks with vmap, which this device cannot: there only the experts are on it.
            for where in ("cpu", DEVICE)[: 2 if transformers.__version__ >= "5" else 1]:
                got = losses(backend, True, where)
                print(backend, where, expected, got)
                assert all(abs(a - b) < near * b for a, b in zip(got, expected))
        try:
            torch.ones(2) + torch.ones(2, device=DEVICE)
        except RuntimeError:
            print("done")
    """)
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        capture_output=True, text=True, timeout=240, cwd=Path(__file__).parent, check=False,
    )  # fmt: skip
    print(run.stdout)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.endswith("done\n")
