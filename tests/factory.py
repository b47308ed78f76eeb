"""Real runs of LLaMA-Factory on a tiny Qwen3-MoE: in this process, as a command, or stock in a process of its own."""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM


LAYERS, E = 2, 4
_RANKED = {"prompt": "instruction", "query": "input", "chosen": "chosen", "rejected": "rejected"}
_TAGGED = {"prompt": "instruction", "query": "input", "response": "output", "kto_tag": "good"}
DATASETS = {
    "rows": {"file_name": "rows.json"},
    "pairs": {"file_name": "pairs.json", "ranking": True, "columns": _RANKED},
    "judged": {"file_name": "rows.json", "columns": _TAGGED},
    "text": {"file_name": "rows.json", "columns": {"prompt": "output"}},
}
# What LLaMA-Factory imports and never uses for text; ktmoe does the same for `ktmoe train`.
_STOCK = """
import importlib.machinery, importlib.util, sys, types, yaml
if importlib.util.find_spec("torchaudio") is None:
    sys.modules["torchaudio"] = types.ModuleType("torchaudio")
    sys.modules["torchaudio"].__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)
from llamafactory.train.tuner import run_exp
for path in sys.argv[1:]:
    with open(path) as file:
        run_exp(yaml.safe_load(file))
assert "ktmoe" not in sys.modules
"""


def save_tokenizer(folder):
    """Of bytes, and the few words that they make."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    special = ["<eos>", "<pad>"]
    trainer = trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["the cat sat on the mat"], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")
    fast.save_pretrained(folder)
    return fast


def save_model(folder):
    """Random weights, the experts' large enough that a wrong expert shows in the loss."""
    fast = save_tokenizer(folder)
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


def losses(folder):
    """The logged training losses of a run, by step."""
    state = json.loads((folder / "trainer_state.json").read_text())
    return {log["step"]: log["loss"] for log in state["log_history"] if "loss" in log}


class Workspace:
    """A model, datasets and a configuration. Every run goes to a folder of its own, with other keys."""

    def __init__(self, root, steps=6):
        from ktmoe.llamafactory import install

        install()
        self.root, self.model = root, root / "model"
        save_model(self.model)
        outputs = [f"cat {i} on mat {i * i}" for i in range(12)]
        rows = [
            {"instruction": f"count {i}", "input": "", "output": o, "good": i % 3 > 0} for i, o in enumerate(outputs)
        ]
        pairs = [
            {"instruction": f"count {i}", "input": "", "chosen": o, "rejected": f"dog {7 * i} at {i}"}
            for i, o in enumerate(outputs)
        ]
        (root / "rows.json").write_text(json.dumps(rows))
        (root / "pairs.json").write_text(json.dumps(pairs))
        (root / "dataset_info.json").write_text(json.dumps(DATASETS))
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
            "max_steps": steps,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "save_steps": steps // 2,
            "use_cpu": True,
            "bf16": True,
            "report_to": "none",
            "use_kt": True,
            "kt_backend": "torch",
        }

    def fp32(self):
        """The same model in fp32, for comparisons that bf16 would blur."""
        folder = self.root / "fp32"
        if not folder.exists():
            shutil.copytree(self.model, folder)
            Qwen3MoeForCausalLM.from_pretrained(folder, dtype=torch.float32).save_pretrained(folder)
        return folder

    def keys(self, name, **keys):
        """The configuration of a run."""
        config = {**self.config, "output_dir": str(self.root / name), **keys}
        if config["stage"] == "dpo":
            config = {**config, "dataset": "pairs"}
        return {k: v for k, v in config.items() if v is not None}

    def run(self, name, **keys):
        """Trains in this process. Returns the losses by step."""
        from llamafactory.train.tuner import run_exp

        with contextlib.redirect_stderr(io.StringIO()):
            run_exp(self.keys(name, **keys))
        return losses(self.root / name)

    def write(self, name, **keys):
        """The configuration of a run, as a file."""
        path = self.root / f"{name}.yaml"
        path.write_text(yaml.safe_dump(self.keys(name, **keys)))
        return path

    def command(self, name, environment=None, *, command="train", extra=(), typed=None, **keys):
        """Runs a command of ktmoe to its end."""
        return subprocess.run(
            [sys.executable, "-m", "ktmoe.cli", command, str(self.write(name, **keys)), *extra],
            capture_output=True,
            text=True,
            timeout=240,
            input=typed,
            env={**os.environ, **(environment or {})},
        )

    def train(self, name, environment=None, **keys):
        """`ktmoe train`. Returns the losses by step, and what was printed."""
        done = self.command(name, environment, extra=["logging_first_step=true"], **keys)
        assert done.returncode == 0, done.stderr[-3000:]
        return losses(self.root / name), done.stdout

    def stock(self, runs, **keys):
        """Stock LLaMA-Factory, without ktmoe, once per entry of `runs`. Returns their losses, by name."""
        kt = [k for k in self.config if k.startswith(("kt_", "use_kt"))]
        files = [str(self.write(f"stock-{name}", **(dict.fromkeys(kt) | keys | more))) for name, more in runs.items()]
        done = subprocess.run([sys.executable, "-c", _STOCK, *files], capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr[-3000:]
        return {name: losses(self.root / f"stock-{name}") for name in runs}
