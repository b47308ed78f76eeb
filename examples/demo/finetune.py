"""Run ``ktmoe train`` on the example YAML, with the demo's model, data and sizes given on the command line."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from dataset import HELD_OUT_DATASET, TRAIN_DATASET


EXAMPLE_YAML = Path(__file__).resolve().parent.parent / "qwen3_moe_lora_sft_kt.yaml"


@dataclass(frozen=True)
class FinetuneConfig:
    """What the demo changes in the example."""

    backend: str = "auto"
    seed: int = 0
    epochs: float = 2.0
    batch_size: int = 16
    learning_rate: float = 2e-3  # the example's 1e-4 is for 30 billion parameters, not for 8 million
    evaluations: int = 3


def usable_cpus() -> int:
    """CPUs this process may run on, which in a container are fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def overrides(config: FinetuneConfig, base: Path, data: Path, adapter: Path, train_pairs: int) -> dict[str, object]:
    """The ``key=value`` arguments that turn the example for a 30B model into the demo's run."""
    steps = int(-(-train_pairs // config.batch_size) * config.epochs)
    values: dict[str, object] = {
        "model_name_or_path": base,
        "dataset_dir": data,
        "dataset": TRAIN_DATASET,
        "eval_dataset": HELD_OUT_DATASET,
        "val_size": 0.0,
        "output_dir": adapter,
        "kt_backend": config.backend,
        "seed": config.seed,
        "cutoff_len": 256,
        "num_train_epochs": config.epochs,
        "per_device_train_batch_size": config.batch_size,
        "per_device_eval_batch_size": config.batch_size,
        "gradient_accumulation_steps": 1,
        "learning_rate": config.learning_rate,
        "eval_steps": max(1, steps // config.evaluations),
        # A model this small needs neither recomputation to save memory nor more than a few threads in one pool.
        "disable_gradient_checkpointing": True,
        "kt_num_threads": max(1, min(4, usable_cpus() // 2)),
        "kt_tp_enabled": False,
        # Worker processes cost more than they save on data this small.
        "preprocessing_num_workers": 1,
        "dataloader_num_workers": 0,
    }
    if not torch.cuda.is_available():
        values["use_cpu"] = True
    return values


def command(config: FinetuneConfig, base: Path, data: Path, adapter: Path, train_pairs: int) -> list[str]:
    """The command line a user would type, as a list."""
    arguments = [f"{key}={value}" for key, value in overrides(config, base, data, adapter, train_pairs).items()]
    return ["train", str(EXAMPLE_YAML), *arguments]


def environment(cache: Path) -> dict[str, str]:
    """The user's environment, offline, with caches in the demo's own folder.

    One OpenMP thread unless the user says otherwise: operations this small spend a busy host's time spinning.
    """
    defaults = {
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "HF_HOME": str(cache),
        "TOKENIZERS_PARALLELISM": "false",
    }
    return {**defaults, **os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


def finetune(arguments: list[str], cache: Path) -> None:
    """Run ``ktmoe`` with its output going to the user's terminal.

    Raises:
        subprocess.CalledProcessError: If the run fails; its own message is already on the terminal.
    """
    subprocess.run([sys.executable, "-m", "ktmoe.cli", *arguments], env=environment(cache), check=True)
