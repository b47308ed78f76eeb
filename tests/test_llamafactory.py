"""`ktmoe train`: real runs of stock LLaMA-Factory on a tiny Qwen3-MoE, each in a process of its own."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM
from typer.testing import CliRunner

import ktmoe
from ktmoe.cli import app


pytestmark = pytest.mark.skipif(importlib.util.find_spec("llamafactory") is None, reason="LLaMA-Factory not installed")

STEPS, HALF = 6, 3
LAYERS, E = 2, 4


def save_model(folder):
    """Random weights, the experts' large enough that a wrong expert shows in the loss."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    special = ["<eos>", "<pad>"]
    trainer = trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["the cat sat on the mat"], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=len(fast),
        hidden_size=64,
        intermediate_size=64,
        moe_intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=E,
        num_experts_per_tok=2,
        initializer_range=0.2,
        eos_token_id=0,
        pad_token_id=1,
    )
    Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


class Workspace:
    """A model, a dataset and a configuration; `train` runs them with other keys in a folder of their own."""

    def __init__(self, root):
        self.root, self.model = root, root / "model"
        save_model(self.model)
        rows = [{"instruction": f"count {i}", "input": "", "output": f"cat {i} on mat {i * i}"} for i in range(12)]
        (root / "rows.json").write_text(json.dumps(rows))
        (root / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json"}}))
        self.config = {
            "model_name_or_path": str(self.model),
            "stage": "sft",
            "do_train": True,
            "finetuning_type": "lora",
            "lora_rank": 8,
            "lora_target": "all",
            "dataset": "rows",
            "dataset_dir": str(root),
            "template": "default",
            "cutoff_len": 64,
            "per_device_train_batch_size": 2,
            "max_steps": STEPS,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "save_steps": HALF,
            "use_cpu": True,
            "bf16": True,
            "report_to": "none",
            "use_kt": True,
            "kt_backend": "torch",
        }

    def command(self, name, environment=None, **keys):
        config = {**self.config, "output_dir": str(self.root / name), **keys}
        path = self.root / f"{name}.yaml"
        path.write_text(yaml.safe_dump(config))
        return subprocess.run(
            [sys.executable, "-m", "ktmoe.cli", "train", str(path), "logging_first_step=true"],
            capture_output=True,
            text=True,
            timeout=240,
            env={**os.environ, **(environment or {})},
        )

    def train(self, name, environment=None, **keys):
        """The losses by step, and what was printed."""
        done = self.command(name, environment, **keys)
        assert done.returncode == 0, done.stderr[-3000:]
        state = json.loads((self.root / name / "trainer_state.json").read_text())
        return {log["step"]: log["loss"] for log in state["log_history"] if "loss" in log}, done.stdout


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return Workspace(tmp_path_factory.mktemp("llamafactory"))


@pytest.fixture(scope="module")
def trained(workspace):
    """The run that the others are compared with."""
    return workspace.train("trained")


def test_loss_falls_and_the_summary_is_logged_once(trained):
    losses, printed = trained
    assert list(losses) == list(range(1, STEPS + 1))
    assert losses[STEPS] < losses[1]
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


def assert_close(losses, other, within=0.01):
    assert losses.keys() == other.keys()
    for step, loss in losses.items():
        assert abs(loss - other[step]) <= within * loss, f"step {step}: {other[step]}, expected {loss}"


def test_reference_backend_gives_the_same_losses(trained, workspace):
    losses, _ = workspace.train("reference", kt_backend="reference")
    assert_close(losses, trained[0])


@pytest.mark.parametrize("backend", ["AMXBF16", pytest.param("AMXInt8", marks=pytest.mark.slow)])
def test_kernel_gives_the_same_losses(trained, workspace, kernel, backend):
    losses, printed = workspace.train(backend, kt_backend=backend, kt_num_threads=2)
    assert f"ktmoe: routed experts on {backend}: kt_kernel" in printed
    assert_close(losses, trained[0])


def test_resume_continues_as_if_unbroken(trained, workspace):
    checkpoint = workspace.root / "trained" / f"checkpoint-{HALF}"
    losses, _ = workspace.train("resumed", resume_from_checkpoint=str(checkpoint))
    assert losses == trained[0]
    unbroken = load_file(workspace.root / "trained" / "adapter_model.safetensors")
    resumed = load_file(workspace.root / "resumed" / "adapter_model.safetensors")
    assert unbroken.keys() == resumed.keys()
    for name, tensor in unbroken.items():
        assert torch.equal(tensor, resumed[name]), name


def test_stock_llamafactory_agrees(trained, workspace):
    """The oracle: with `use_kt: false` the same adapter gives the same loss by transformers' experts and peft's LoRA.

    At the first step alone: stock peft fuses gate and up into one LoRA of twice the rank, and trains its zeros too.
    """
    model = workspace.root / "fp32"
    shutil.copytree(workspace.model, model)
    Qwen3MoeForCausalLM.from_pretrained(model, dtype=torch.float32).save_pretrained(model)
    keys = {
        "model_name_or_path": str(model),
        "adapter_name_or_path": str(workspace.root / "trained" / f"checkpoint-{HALF}"),
        "lora_rank": 4,  # the adapter's own rank counts
        "max_steps": 1,
        "bf16": False,
    }
    ours, printed = workspace.train("ours", kt_backend="reference", **keys)
    stock, stock_printed = workspace.train("stock", use_kt=False, **keys)
    assert "ktmoe: routed experts on reference" in printed
    assert "ktmoe" not in stock_printed
    assert_close(stock, ours, within=1e-5)
    assert abs(stock[1] - trained[0][1]) > 0.01 * stock[1], "the adapter made no difference, nor would a wrong one"


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
    assert done.stderr.startswith("ktmoe: kt_backend: got 'AMXBF'; expected one of ")
    assert done.stderr.count("\n") == 1
    assert not (workspace.root / "refused").exists()


@pytest.mark.slow
def test_one_process_of_torchrun(trained, workspace):
    losses, printed = workspace.train("torchrun", {"FORCE_TORCHRUN": "1"})
    assert "Initializing 1 distributed tasks" in printed
    assert_close(losses, trained[0])


def test_version_and_help():
    runner = CliRunner()
    assert runner.invoke(app, ["--version"]).output.strip() == f"ktmoe {ktmoe.__version__}"
    printed = " ".join(runner.invoke(app, ["train", "--help"]).output.split())
    for word in ("LLaMA-Factory", "use_kt: true", "kt_backend", "kt_num_threads", "train -h"):
        assert word in printed
