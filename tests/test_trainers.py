"""Trainers beside LLaMA-Factory on what `ktmoe.load_model` returns: transformers, TRL, and a loop by hand."""

import contextlib
import json
import math
import shutil

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from factory import losses, save_model
from helpers import BACKENDS
from peft import LoraConfig
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file
from transformers import AutoTokenizer, Trainer, TrainingArguments


with contextlib.suppress(ImportError):  # trl 0.24's DPOTrainer cannot be imported on transformers 5 without this
    import llamafactory.extras.packages  # noqa: F401

from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import ktmoe
from ktmoe import KTConfig, MoEExperts


STEPS = 6
TEXTS = [f"count {i}: cat {i} on mat {i * i}" for i in range(12)]
COMMON = dict(
    max_steps=STEPS,
    save_steps=STEPS // 2,
    logging_steps=1,
    per_device_train_batch_size=2,
    learning_rate=1e-3,
    use_cpu=True,
    bf16=True,
    report_to=[],
    disable_tqdm=True,
)
every_backend = pytest.mark.parametrize("name", BACKENDS)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trainers") / "model"
    save_model(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(path):
    return AutoTokenizer.from_pretrained(path)


def load(path, name="torch", **options):
    """A model with LoRA on attention and experts; the same numbers at every call."""
    torch.manual_seed(0)
    lora = LoraConfig(
        **dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "experts"], task_type="CAUSAL_LM") | options
    )
    config = KTConfig(kt_backend=name, kt_max_len=256, kt_num_threads=1)
    return ktmoe.load_model(path, config, lora=lora)


def close(model):
    for module in model.modules():
        if isinstance(module, MoEExperts):
            module.close()


def rows(tokenizer):
    ids = [tokenizer(text).input_ids for text in TEXTS]
    length = max(map(len, ids))
    padded = [row + [tokenizer.pad_token_id] * (length - len(row)) for row in ids]
    masks = [[1] * len(row) + [0] * (length - len(row)) for row in ids]
    labels = [row + [-100] * (length - len(row)) for row in ids]
    return Dataset.from_dict({"input_ids": padded, "attention_mask": masks, "labels": labels})


def pairs():
    prompts = [f"count {i}: " for i in range(12)]
    chosen, rejected = ([f"{animal} {i} on mat {i * i}" for i in range(12)] for animal in ("cat", "dog"))
    return Dataset.from_dict({"prompt": prompts, "chosen": chosen, "rejected": rejected})


def plain(path, tokenizer, out, name="torch", model=None, **options):
    data = rows(tokenizer)
    args = TrainingArguments(str(out), **{**COMMON, **options})
    return Trainer(model or load(path, name), args, train_dataset=data, eval_dataset=data.select(range(4)))


def sft(path, tokenizer, out, name="torch", **options):
    args = SFTConfig(str(out), **{**COMMON, **options}, max_length=64)
    data = Dataset.from_dict({"text": TEXTS})
    return SFTTrainer(load(path, name), args, train_dataset=data, eval_dataset=data, processing_class=tokenizer)


def dpo(path, tokenizer, out, name="torch", **options):
    args = DPOConfig(str(out), **{**COMMON, **options}, max_length=64)
    data, model = pairs(), load(path, name)
    model.get_base_model().warnings_issued = {}  # trl 0.24 expects it of every model; transformers 5 has it no more
    return DPOTrainer(model, None, args, train_dataset=data, eval_dataset=data, processing_class=tokenizer)


TRAINERS = {"Trainer": plain, "SFTTrainer": sft, "DPOTrainer": dpo}
every_trainer = pytest.mark.parametrize("make", TRAINERS.values(), ids=TRAINERS)


def adapter(folder):
    return load_file(folder / "adapter_model.safetensors")


def same(found, expected):
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


@every_trainer
def test_resume_is_bitwise_not_stopping(make, path, tokenizer, tmp_path):
    """And the checkpoints hold the expert LoRA, which the Trainer reads back by `model.load_adapter`."""
    trainer = make(path, tokenizer, tmp_path / "whole")
    trainer.train()
    trainer.save_model()
    half = tmp_path / "whole" / f"checkpoint-{STEPS // 2}"
    saved = adapter(half)
    assert [k for k in saved if ".experts." in k and not saved[k].any()] == []
    assert sum(".experts." in k for k in saved) == 2 * 4 * 3 * 2

    resumed = make(path, tokenizer, tmp_path / "resumed", model=None) if make is plain else make(
        path, tokenizer, tmp_path / "resumed"
    )  # fmt: skip
    resumed.train(resume_from_checkpoint=str(half))
    resumed.save_model()
    same(adapter(tmp_path / "resumed"), adapter(tmp_path / "whole"))
    history = [t.state.log_history[STEPS // 2 : STEPS] for t in (trainer, resumed)]
    assert [h["loss"] for h in history[0]] == [h["loss"] for h in history[1]]


@every_trainer
def test_the_best_model_is_loaded_at_the_end(make, path, tokenizer, tmp_path):
    """A learning rate that ruins the model: the first checkpoint stays the best."""
    options = dict(eval_strategy="steps", eval_steps=2, save_steps=2, load_best_model_at_end=True, learning_rate=0.3)
    trainer = make(path, tokenizer, tmp_path, **options)
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best is not None
    trainer.save_model()
    same(adapter(tmp_path), adapter(tmp_path / best.rpartition("/")[2]))
    others = [p for p in tmp_path.glob("checkpoint-*") if str(p) != best]
    assert others
    name = next(k for k in adapter(tmp_path) if ".experts." in k)
    assert not any(torch.equal(adapter(p)[name], adapter(tmp_path)[name]) for p in others)


@pytest.mark.parametrize("name", BACKENDS[2:])
@every_trainer
def test_kernels_train_as_the_reference_does(make, name, path, tokenizer, tmp_path):
    found = {}
    for backend in (name, "reference"):
        trainer = make(path, tokenizer, tmp_path / backend, backend, save_strategy="no", max_steps=3)
        trainer.train()
        found[backend] = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        close(trainer.model)
    assert len(found[name]) == 3
    assert all(abs(a - b) < 0.03 for a, b in zip(*found.values(), strict=True)), found
