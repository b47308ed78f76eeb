"""Run ``ktmoe train`` on an example YAML, with the demo's model, data and sizes given on the command line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from dataset import HELD_OUT, HELD_OUT_PREFERENCES, PREFERENCES, TRAIN


EXAMPLES = Path(__file__).resolve().parent.parent
STAGES = {
    "sft": {
        "yaml": "qwen3_moe_lora_sft_kt.yaml", "dataset": TRAIN, "eval_dataset": HELD_OUT,
        "per_device_train_batch_size": 8, "learning_rate": 2e-4, "max_steps": 30, "eval_steps": 15,
        "eval_on_start": True,
    },
    "dpo": {
        "yaml": "qwen3_moe_lora_dpo_kt.yaml", "dataset": PREFERENCES, "eval_dataset": HELD_OUT_PREFERENCES,
        "per_device_train_batch_size": 4, "learning_rate": 3e-4, "max_steps": 30, "eval_steps": 30,
        "pref_ftx": 1.0,  # and learn to give the preferred answer, which the model would never give by itself
    },
}  # fmt: skip
# Question, answer and template take some 40 tokens: little to compute with, and no memory to save.
DEMO = {
    "template": "smollm", "cutoff_len": 256, "val_size": 0.0, "per_device_eval_batch_size": 16,
    "gradient_accumulation_steps": 1, "eval_strategy": "steps", "logging_steps": 2,
    "disable_gradient_checkpointing": True, "preprocessing_num_workers": 1, "dataloader_num_workers": 0,
    "kt_tp_enabled": False, "save_only_model": True,
}  # fmt: skip


def usable_cpus() -> int:
    """CPUs this process may run on, which in a container are fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def command(
    stage: str, model: Path, data: Path, adapter: Path, backend: str, seed: int, steps: int | None
) -> list[str]:
    """What a user would type after ``ktmoe`` to turn an example for a 30B model into the demo's run."""
    values: dict[str, object] = {
        "model_name_or_path": model, "dataset_dir": data, "output_dir": adapter, "kt_backend": backend, "seed": seed,
        **DEMO, **STAGES[stage],
    }  # fmt: skip
    yaml = EXAMPLES / str(values.pop("yaml"))
    if steps is not None:
        values |= {"max_steps": steps, "eval_steps": steps}
    if not torch.cuda.is_available():
        values["use_cpu"] = True
        # Where a CPU has no instructions for bfloat16, float32 is many times faster.
        values["bf16"] = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return ["train", str(yaml), *(f"{key}={value}" for key, value in values.items())]


def environment(cache: Path) -> dict[str, str]:
    """The user's environment, offline, with caches in the demo's own folder and threads that do not spin."""
    defaults = {
        "OMP_NUM_THREADS": str(min(8, usable_cpus())),
        "OMP_WAIT_POLICY": "PASSIVE",
        "HF_HOME": str(cache),
        "TOKENIZERS_PARALLELISM": "false",
    }
    return {**defaults, **os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


def ktmoe(arguments: list[str], cache: Path) -> None:
    """Run ``ktmoe`` with its output going to the user's terminal.

    Raises:
        subprocess.CalledProcessError: If the run fails; its own message is already on the terminal.
    """
    subprocess.run([sys.executable, "-m", "ktmoe.cli", *arguments], env=environment(cache), check=True)
