"""`ktmoe train`: real runs of stock LLaMA-Factory on a tiny Qwen3-MoE, as commands and in this process."""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from factory import LAYERS, E, Workspace, losses
from helpers import free_port
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM, Qwen3MoeForCausalLM, TrainerCallback
from typer.testing import CliRunner

import ktmoe
from ktmoe.cli import app
from ktmoe.verify.growth import trend
from ktmoe.verify.usage import measure, steady


pytestmark = pytest.mark.skipif(importlib.util.find_spec("llamafactory") is None, reason="LLaMA-Factory not installed")

STEPS, HALF = 6, 3


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return Workspace(tmp_path_factory.mktemp("llamafactory"))


@pytest.fixture(scope="module")
def trained(workspace):
    """The run that the others are compared with."""
    return workspace.train("trained")


def test_loss_falls_and_the_summary_is_logged_once(trained):
    found, printed = trained
    assert list(found) == list(range(1, STEPS + 1))
    assert found[STEPS] < found[1]
    assert printed.count("ktmoe: routed experts on torch") == 1
    parameters = LAYERS * E * 3 * 8 * (64 + 64)
    assert f"{parameters:,} in expert LoRA" in printed
    assert re.search(rf"trainable params: {parameters + LAYERS * 8 * (64 + 64 + 2 * (64 + 32) + 64 + 64):,} ", printed)


def test_adapter_has_peft_keys_per_expert(trained, workspace):
    for folder in ("trained", f"trained/checkpoint-{HALF}"):
        keys = load_file(workspace.root / folder / "adapter_model.safetensors")
        for layer in range(LAYERS):
            for e in range(E):
                for projection in ("gate_proj", "up_proj", "down_proj"):
                    for side in ("lora_A", "lora_B"):
                        name = f"base_model.model.model.layers.{layer}.mlp.experts.{e}.{projection}.{side}.weight"
                        assert keys[name].any(), f"{name} was never trained"
        assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in keys


def adapter(folder):
    return load_file(folder / "adapter_model.safetensors")


def same(found, expected):
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def test_resume_continues_as_if_unbroken(trained, workspace):
    checkpoint = workspace.root / "trained" / f"checkpoint-{HALF}"
    assert workspace.run("resumed", resume_from_checkpoint=str(checkpoint)) == trained[0]
    same(adapter(workspace.root / "resumed"), adapter(workspace.root / "trained"))


def test_remote_code_is_not_needed_where_transformers_has_the_class(workspace):
    model = workspace.root / "remote"
    shutil.copytree(workspace.model, model)
    config = json.loads((model / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "gone.Config", "AutoModelForCausalLM": "gone.Model"}
    (model / "config.json").write_text(json.dumps(config))
    # With attention targets alone: that is said once, too.
    _, printed = workspace.train(
        "native", model_name_or_path=str(model), trust_remote_code=True, max_steps=1, lora_target="q_proj,v_proj"
    )
    assert printed.count("its remote code is not run") == 1
    assert printed.count("leaves the routed experts without LoRA") == 1


def test_error_is_one_line_and_exit_code_2(workspace):
    done = workspace.command("refused", kt_backend="AMXBF")
    assert done.returncode == 2
    # bitsandbytes says while it is imported, wherever it is installed, that it has no faster product for CPUs.
    (said,) = [line for line in done.stderr.splitlines() if "kernels-community" not in line]
    assert said.startswith("ktmoe: kt_backend: got 'AMXBF'; expected one of ")
    assert not (workspace.root / "refused").exists()


def answers(workspace, **keys):
    from llamafactory.chat import ChatModel

    config = {"model_name_or_path": str(workspace.fp32()), "template": "default", "infer_dtype": "float32", **keys}
    chat = ChatModel({**config, "do_sample": False, "max_new_tokens": 12})
    messages = [{"role": "user", "content": "count 3"}]
    streamed = "".join(chat.stream_chat(messages))
    (answer,) = chat.chat(messages)
    assert answer.response_text == streamed
    return streamed, chat.engine.model


def test_chat(workspace):
    """Greedy answers with the adapter, as stock LLaMA-Factory gives them by merging it."""
    workspace.run("talkative", learning_rate=1e-2, model_name_or_path=str(workspace.fp32()), bf16=False)
    one = {"adapter_name_or_path": str(workspace.root / "talkative")}
    kt = {"use_kt": True, "kt_backend": "reference"}
    ours, model = answers(workspace, **kt, **one)
    assert len([m for m in model.modules() if isinstance(m, ktmoe.MoEExperts)]) == LAYERS
    assert ours == answers(workspace, **one)[0]
    assert ours != answers(workspace, **kt)[0]


@pytest.mark.slow
def test_chat_in_the_terminal(workspace, trained):
    keys = {"do_sample": False, "max_new_tokens": 12, "adapter_name_or_path": str(workspace.root / "trained")}
    training = [
        key for key in workspace.config if key not in ("model_name_or_path", "template", "use_kt", "kt_backend")
    ]
    done = workspace.command(
        "chat", command="chat", typed="count 3\nexit\n", **dict.fromkeys([*training, "output_dir"]), **keys
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Assistant: " in done.stdout
    assert "ktmoe: routed experts on torch" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_two_processes(workspace, stage):
    """torchrun as LLaMA-Factory starts it; in bf16 outside of the experts, whose rounding depends on the batch."""
    keys = {"stage": stage, "kt_backend": "reference", "kt_num_threads": 1}
    one, _ = workspace.train(f"one {stage}", per_device_train_batch_size=4, **keys)
    launched = {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "2", "MASTER_PORT": str(free_port())}
    two, said = workspace.train(f"two {stage}", launched, per_device_train_batch_size=2, **keys)
    assert two == pytest.approx(one, rel=0.03)
    assert "2 processes of this host, 2 in all: rank 0 holds this host's experts" in said
    assert (workspace.root / f"two {stage}" / "adapter_model.safetensors").is_file()


def test_leaving_a_chat_while_a_thread_still_computes(workspace):
    """An answer's last word comes before its thread has ended; Python's end stopped that thread inside torch."""
    keys = {"model_name_or_path": str(workspace.fp32()), "template": "default", "max_new_tokens": 2}
    script = textwrap.dedent(f"""
        import functools, io, sys, time, torch, transformers
        from ktmoe.llamafactory import main
        stock = transformers.GenerationMixin.generate
        @functools.wraps(stock)
        def slow(*args, **kwargs):
            out, x, end = stock(*args, **kwargs), torch.ones(64, 64), time.monotonic() + 2
            while time.monotonic() < end:
                x = torch.nn.Parameter(x.detach()).tanh().sum().backward() or x
            return out
        transformers.GenerationMixin.generate = slow
        sys.stdin = io.StringIO("count 3\\nexit\\n")
        main({[*(f"--{k}={v}" for k, v in keys.items()), "--use_kt=true", "--kt_backend=torch"]}, "chat")
    """)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)  # Python's own end counts
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Assistant: " in done.stdout


def test_export(workspace):
    """By either way, the merged model's logits are those of the adapter on ktmoe."""
    from llamafactory.train.tuner import export_model

    model, one = workspace.fp32(), str(workspace.root / "exported")
    workspace.run("exported", learning_rate=1e-2, model_name_or_path=str(model), bf16=False)
    keys = {"model_name_or_path": str(model), "adapter_name_or_path": one, "template": "default"}
    base = ktmoe.load_model(model, ktmoe.KTConfig(kt_backend="reference"))
    ids = torch.arange(2, 34).unsqueeze(0)
    plain = base(ids).logits
    ours = ktmoe.load_adapter(base, one)(ids).logits
    assert (ours - plain).abs().max() > 0.1
    for name, more in (("stock", {"infer_dtype": "float32"}), ("kt", {"use_kt": True, "kt_backend": "reference"})):
        out = workspace.root / f"merged-{name}"
        export_model({**keys, "export_dir": str(out), **more})
        merged = Qwen3MoeForCausalLM.from_pretrained(out)(ids).logits
        torch.testing.assert_close(merged, ours, rtol=1e-3, atol=1e-3)
        assert {"Modelfile", "tokenizer.json"} <= {p.name for p in out.iterdir()}


def test_stock_peft_that_would_drop_expert_lora_is_refused(workspace, tmp_path):
    """peft 0.20 has no Qwen2-MoE in its table: it would leave per-expert LoRA out and go on."""
    from llamafactory.chat import ChatModel

    config = Qwen2MoeConfig(
        vocab_size=270, hidden_size=64, intermediate_size=64, moe_intermediate_size=64, num_hidden_layers=1,
        shared_expert_intermediate_size=64, num_attention_heads=2, num_key_value_heads=2, num_experts=2,
        num_experts_per_tok=2,
    )  # fmt: skip
    shutil.copytree(workspace.model, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    Qwen2MoeForCausalLM(config).save_pretrained(tmp_path / "model")
    one = tmp_path / "adapter"
    LoraConfig(r=2, target_modules=["q_proj", "gate_proj", "up_proj", "down_proj"]).save_pretrained(one)
    tensors = {"self_attn.q_proj": (64, 64)} | {
        f"mlp.experts.{e}.{p}": (64, 64) for e in range(2) for p in ("gate_proj", "up_proj", "down_proj")
    }
    save_file(
        {
            f"base_model.model.model.layers.0.{name}.lora_{side}.weight": torch.ones(2, n_in)
            if side == "A"
            else torch.ones(n_out, 2)
            for name, (n_out, n_in) in tensors.items()
            for side in "AB"
        },
        one / "adapter_model.safetensors",
    )
    keys = {"model_name_or_path": str(tmp_path / "model"), "adapter_name_or_path": str(one), "template": "default"}
    with pytest.raises(ktmoe.KTError, match=r"leaves out without a word for Qwen2MoeForCausalLM. Write use_kt: true"):
        ChatModel(keys)
    ChatModel({**keys, "use_kt": True, "kt_backend": "reference"})


@pytest.mark.slow
def test_one_process_of_torchrun(trained, workspace):
    found, printed = workspace.train("torchrun", {"FORCE_TORCHRUN": "1"})
    assert "Initializing 1 distributed tasks" in printed
    assert found == pytest.approx(trained[0], rel=1e-3)


EXPERTS = {
    f"layers.{n}.mlp.experts.{e}.{p}"
    for n in range(LAYERS)
    for e in range(E)
    for p in ("gate_proj", "up_proj", "down_proj")
}
ATTENTION = {f"layers.{n}.self_attn.{p}_proj" for n in range(LAYERS) for p in "qkvo"}


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("all", EXPERTS | ATTENTION),
        ("q_proj,k_proj,v_proj,o_proj", ATTENTION),
        ("experts", EXPERTS),
        ("gate_proj,up_proj,down_proj", EXPERTS),
        ("model.layers.1.mlp.experts,layers.0.self_attn.q_proj",
         {name for name in EXPERTS if "layers.1." in name} | {"layers.0.self_attn.q_proj"}),
    ],
)  # fmt: skip
def test_lora_target(workspace, target, expected, request):
    workspace.run(request.node.name, lora_target=target, max_steps=1)
    keys = adapter(workspace.root / request.node.name)
    assert {k.removeprefix("base_model.model.model.").partition(".lora_")[0] for k in keys} == expected


def logs(folder, key):
    return [h[key] for h in json.loads((folder / "trainer_state.json").read_text())["log_history"] if key in h]


def test_one_batch_however_it_is_cut(workspace):
    """Twelve rows padded in one batch, packed into one sequence, or accumulated from six batches: one gradient."""
    keys = dict(kt_backend="reference", bf16=False, max_steps=1, optim="sgd", learning_rate=1.0, max_grad_norm=1e9)
    keys["model_name_or_path"] = str(workspace.fp32())
    cuts = {
        "padded": dict(per_device_train_batch_size=12),
        "packed": dict(per_device_train_batch_size=1, packing=True, neat_packing=True, cutoff_len=1024),
        "accumulated": dict(per_device_train_batch_size=2, gradient_accumulation_steps=6),
    }
    for name, cut in cuts.items():
        found = workspace.run(name, **keys | cut)
        assert found[1] == pytest.approx(losses(workspace.root / "padded")[1], rel=1e-5), name
        expected = adapter(workspace.root / "padded")
        for key, tensor in adapter(workspace.root / name).items():
            torch.testing.assert_close(tensor, expected[key], rtol=1e-3, atol=1e-5)


def test_the_best_model_is_loaded_at_the_end(workspace):
    """The largest loss counts as the best: it falls, so the first checkpoint stays that, and the run stops early."""
    keys = dict(eval_dataset="rows", eval_strategy="steps", eval_steps=1, save_steps=1)
    best = dict(metric_for_best_model="eval_loss", greater_is_better=True, load_best_model_at_end=True)
    workspace.run("best", early_stopping_steps=2, **best, **keys)
    evaluated = logs(workspace.root / "best", "eval_loss")
    assert sorted(evaluated, reverse=True) == evaluated
    assert len(evaluated) == 3 < STEPS
    same(adapter(workspace.root / "best"), adapter(workspace.root / "best" / "checkpoint-1"))


def test_evaluation_alone(workspace, trained):
    """`do_eval` with the adapter of a run gives the loss that the run itself ends with."""
    keys = dict(do_train=False, do_eval=True, eval_dataset="rows")
    from llamafactory.train.tuner import run_exp

    run_exp(workspace.keys("evaluated", adapter_name_or_path=str(workspace.root / "trained"), **keys))
    run_exp(workspace.keys("base", **keys))
    loss, base = (
        json.loads((workspace.root / name / "eval_results.json").read_text())["eval_loss"]
        for name in ("evaluated", "base")
    )
    assert loss < base
    both = workspace.run("both", do_eval=True, eval_dataset="rows")
    assert both == trained[0]
    assert json.loads((workspace.root / "both" / "eval_results.json").read_text())["eval_loss"] == pytest.approx(
        loss, rel=5e-3
    )


_MORE = [pytest.param(name, marks=pytest.mark.slow) for name in ("rmsprop", "adagrad", "sgd")]


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch", "adafactor", *_MORE])
def test_optimizers(workspace, optim):
    """Every step sees all rows, so that the loss has to fall."""
    rate = {"sgd": 1.0, "rmsprop": 1e-4}.get(optim, 1e-3)
    found = workspace.run(
        optim, optim=optim, learning_rate=rate, per_device_train_batch_size=12, max_steps=3, save_strategy="no"
    )
    assert found[1] > found[2] > found[3]
    moved = adapter(workspace.root / optim)
    assert [k for k in moved if "lora_B" in k and not moved[k].any()] == []


def test_loraplus(workspace):
    """The B matrices of the experts move by the larger rate too. (Adam's first step is the learning rate.)"""
    workspace.run("lora+", loraplus_lr_ratio=16, max_steps=1, learning_rate=1e-4)
    moved = {k: v for k, v in adapter(workspace.root / "lora+").items() if "lora_B" in k}
    assert all(v.abs().max().item() == pytest.approx(16e-4, rel=0.01) for v in moved.values())


def test_data_loader_workers(workspace, trained, kernel):
    """They are forked after the kernel has started its threads."""
    keys = dict(kt_backend="AMXBF16", kt_num_threads=1, max_steps=2)
    assert workspace.run("workers", dataloader_num_workers=2, **keys) == workspace.run("none", **keys)


class Kill(TrainerCallback):
    """Ends the process in the middle of writing a file of the second checkpoint."""

    def __init__(self, module, name):
        self.module, self.name, self.write = module, name, getattr(module, name)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == STEPS:
            setattr(self.module, self.name, self.half)

    def half(self, obj, path, *args, **kwargs):
        self.write(obj, path, *args, **kwargs)
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)


def killed(path, where):
    """In a process of its own: a run that ends in mid-save."""
    from ktmoe.adapters import writing
    from ktmoe.llamafactory import install

    install()
    from llamafactory.train.tuner import run_exp

    write = {"adapter": (writing, "save_file"), "optimizer": (torch, "save")}[where]
    run_exp(yaml.safe_load(Path(path).read_text()), callbacks=[Kill(*write)])


@pytest.mark.parametrize("where", ["adapter", pytest.param("optimizer", marks=pytest.mark.slow)])
def test_kill_in_mid_save(workspace, trained, where):
    """The half-written checkpoint is left alone, and the run goes on from the complete one as if unbroken."""
    name = f"killed-{where}"
    code = "import sys, test_llamafactory; test_llamafactory.killed(*sys.argv[1:])"
    command = [sys.executable, "-c", code, str(workspace.write(name)), where]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    assert (workspace.root / name / f"checkpoint-{STEPS}").is_dir()
    assert workspace.run(name) == trained[0]
    same(adapter(workspace.root / name), adapter(workspace.root / "trained"))


class Memory(TrainerCallback):
    """Private memory after every step of the last three quarters."""

    def __init__(self):
        self.bytes, self.process = [], psutil.Process()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step > state.max_steps / 4:
            self.bytes.append(measure(self.process)[2])


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("backend", ["torch", pytest.param("AMXBF16", marks=pytest.mark.kernel)])
def test_dpo_with_checkpointing_does_not_grow(workspace, backend):
    from llamafactory.train.tuner import run_exp

    memory = Memory()
    # One pair per step and a routing that stays: oneDNN keeps something for each shape that it has seen, in stock runs
    # as in these, and so there are few.
    keys = dict(
        per_device_train_batch_size=1,
        learning_rate=1e-9,
        stage="dpo",
        kt_backend=backend,
        kt_num_threads=1,
        max_steps=266,
        logging_steps=1000,
        save_strategy="no",
    )
    with steady():
        run_exp(workspace.keys(f"long-{backend}", **keys), callbacks=[memory])
    line = trend(range(len(memory.bytes)), memory.bytes)
    print(f"{line.growth / 2**20:.3f} MiB over {len(memory.bytes)} steps, surely {line.sure_growth / 2**20:.3f}")
    assert len(memory.bytes) >= 199
    assert line.sure_growth < 2**20 / 2


def test_version_and_help():
    runner = CliRunner()
    assert runner.invoke(app, ["--version"]).output.strip() == f"ktmoe {ktmoe.__version__}"
    printed = " ".join(runner.invoke(app, ["train", "--help"]).output.split())
    for word in ("LLaMA-Factory", "use_kt: true", "kt_backend", "kt_num_threads", "train -h"):
        assert word in printed
