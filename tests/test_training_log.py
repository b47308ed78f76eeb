"""The training log: its figures against measurements from outside, under whatever a Trainer does with a model."""

import json
import re
import time

import pytest
import torch
from datasets import Dataset
from factory import Workspace, save_model
from peft import LoraConfig
from transformers import AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

import ktmoe
from ktmoe import KTConfig, recording
from ktmoe.backends.torch.backend import TorchBackend
from ktmoe.training_log import TrainingLog


FIGURES = {
    "tokens_per_second",
    "experts_forward",
    "experts_recompute",
    "experts_backward",
    "outside_experts",
    "experts_gflops",
    "experts_of_gemm",
    "host_memory_gb",
    "expert_imbalance",
    "experts_without_tokens",
}
TEXTS = [f"count {i}: cat {i} on mat {i * i}" for i in range(24)]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("log") / "model"
    save_model(folder)
    return folder


class Outside(TrainerCallback):
    """What a user with a stopwatch sees."""

    def __init__(self):
        self.seconds = {"forward": 0.0, "backward": 0.0, "step": 0.0}
        self.calls = {"forward": 0, "backward": 0}
        self.inside, self.lines = False, []

    def on_step_begin(self, *args, **kwargs):
        self.inside, self.began = True, time.perf_counter()

    def on_step_end(self, *args, **kwargs):
        self.inside = False
        self.seconds["step"] += time.perf_counter() - self.began

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.lines.append(dict(logs))

    def around(self, name, original):
        def timed(backend, *args, **kwargs):
            start = time.perf_counter()
            time.sleep(0.1 if self.inside else 0.03)  # so that a percent is not noise on a busy machine
            found = original(backend, *args, **kwargs)
            if self.inside:
                self.seconds[name] += time.perf_counter() - start
                self.calls[name] += 1
            return found

        return timed


@pytest.fixture
def outside(monkeypatch):
    made = Outside()
    for name in ("forward", "backward"):
        monkeypatch.setattr(TorchBackend, name, made.around(name, getattr(TorchBackend, name)))
    return made


def train(path, folder, *callbacks, **options):
    torch.manual_seed(0)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "experts"], task_type="CAUSAL_LM")
    keys = {k: options.pop(k) for k in ("kt_cpu_activation",) if k in options}
    model = ktmoe.load_model(path, KTConfig(kt_backend="torch", **keys), lora=lora)
    tokenizer = AutoTokenizer.from_pretrained(path)
    rows = [tokenizer(t, padding="max_length", max_length=32, truncation=True) for t in TEXTS]
    data = Dataset.from_list([{**row, "labels": row["input_ids"]} for row in rows])
    defaults = dict(per_device_train_batch_size=2, max_steps=4, logging_steps=2, use_cpu=True, report_to=[])
    arguments = TrainingArguments(folder, **defaults | dict(disable_tqdm=True, save_strategy="no") | options)
    trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data, callbacks=list(callbacks))
    trainer.train()
    return trainer


def spans(trainer):
    return [line for line in trainer.state.log_history if "loss" in line]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_accumulation_steps": 3},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"gradient_checkpointing": True, "kt_cpu_activation": "recompute"},
        {"eval_strategy": "steps", "eval_steps": 1},
    ],
    ids=["plain", "accumulation", "reentrant", "non-reentrant", "recompute", "evaluation"],
)
def test_figures_are_those_of_a_stopwatch(path, tmp_path, outside, options):
    lines = spans(train(path, tmp_path, TrainingLog(), outside, **options))
    assert len(lines) == 2
    assert all(set(line) >= FIGURES for line in lines)
    # Two steps a line.
    found = {n: 2 * sum(line[n] for line in lines) for n in FIGURES if n.startswith("experts_")}
    forward = found["experts_forward"] + found["experts_recompute"]
    assert forward == pytest.approx(outside.seconds["forward"], rel=0.05)
    assert found["experts_backward"] == pytest.approx(outside.seconds["backward"], rel=0.05)
    everything = forward + found["experts_backward"] + 2 * sum(line["outside_experts"] for line in lines)
    assert everything == pytest.approx(outside.seconds["step"], rel=0.05)
    tokens = 4 * 2 * 32 * options.get("gradient_accumulation_steps", 1)
    seconds = sum(tokens / 2 / line["tokens_per_second"] for line in lines)
    assert seconds == pytest.approx(outside.seconds["step"], rel=0.05)
    recomputes = options.get("kt_cpu_activation") == "recompute"
    assert (found["experts_recompute"] > 0.2 * forward) == recomputes


def test_a_run_with_a_log_is_the_run_without(path, tmp_path):
    """To the last bit, and it leaves the same random numbers behind: dropout draws from them."""
    found = []
    for callbacks in ((TrainingLog(),), ()):
        losses = [line["loss"] for line in spans(train(path, tmp_path, *callbacks))]
        found.append((losses, torch.rand(4).tolist()))
    assert found[0] == found[1]


def test_operations_are_those_of_the_products(path, tmp_path):
    """Three products forward and three backward, of 2 operations for each row, input and output."""
    record = recording.Record()
    with recording.into(record):
        train(path, tmp_path, max_steps=1)
    layers, rows = 2, 2 * 32 * 2  # tokens of a batch, to two experts each
    assert record.operations == 2 * 6 * layers * rows * 64 * 64
    assert sorted(record.trained.values()) == [2 * 32] * layers
    assert [int(counts.sum()) for counts in record.tokens.values()] == [rows] * layers


def test_loggers_of_the_trainer_get_the_figures(path, tmp_path):
    """TensorBoard's stand in front of a user's callbacks; this one is put there in the same way."""

    class First(Outside):
        pass

    first = First()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.trainer.DEFAULT_CALLBACKS", [*_defaults(), first])
        train(path, tmp_path, TrainingLog())
    assert [set(line) >= FIGURES for line in first.lines if "loss" in line] == [True, True]


def _defaults():
    from transformers import trainer

    return trainer.DEFAULT_CALLBACKS


def test_imbalance_and_experts_without_tokens():
    log = TrainingLog()
    log._since.record.tokens = {1: torch.tensor([6, 2, 0, 0]), 2: torch.tensor([2, 2, 2, 2])}
    log._since.seconds = log._since.steps = 1
    figures = log._since.figures(1e9)
    assert figures["expert_imbalance"] == (3 + 1) / 2
    assert figures["experts_without_tokens"] == 2


@pytest.mark.parametrize(
    ("recomputed", "forward", "rows", "operations", "said"),
    [
        (3.0, 3.0, 100, 8e9, "kt_cpu_activation: retain"),
        (0.0, 2.0, 100, 2e9, "outside of the experts"),
        (0.0, 9.0, 4, 1e9, "per_device_train_batch_size"),
        (0.0, 9.0, 100, 8e9, "Nothing stands out"),
    ],
)
def test_the_summary_names_what_would_help_most(recomputed, forward, rows, operations, said):
    from ktmoe.training_log import _advice

    log = TrainingLog()
    span = log._all
    span.seconds, span.steps = 10.0, 1
    span.record.recomputed, span.record.forward, span.record.operations = recomputed, forward, operations
    span.record.tokens = {0: torch.full((4,), rows)}
    assert said in _advice(span, 1e9)


def test_without_routed_experts_nothing_is_added(path, tmp_path):
    from transformers import AutoModelForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(path)
    rows = [tokenizer(t, padding="max_length", max_length=32, truncation=True) for t in TEXTS]
    data = Dataset.from_list([{**row, "labels": row["input_ids"]} for row in rows])
    arguments = TrainingArguments(
        tmp_path, max_steps=2, logging_steps=1, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True
    )
    trainer = Trainer(
        AutoModelForCausalLM.from_pretrained(path), arguments, train_dataset=data, callbacks=[TrainingLog()]
    )
    trainer.train()
    assert not any(FIGURES & set(line) for line in trainer.state.log_history)


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_llama_factory_logs_them_by_itself(tmp_path, stage):
    workspace = Workspace(tmp_path)
    done = workspace.command(stage, stage=stage, max_steps=2, logging_steps=1, report_to="none")
    assert done.returncode == 0, done.stderr[-2000:]
    history = json.loads((tmp_path / stage / "trainer_state.json").read_text())["log_history"]
    lines = [line for line in history if "loss" in line]
    assert lines
    assert all(set(line) >= FIGURES for line in lines)
    assert re.search(
        r"ktmoe: \d+ tokens in 2 steps, .* a second\. .* of what a large product reaches here\.", done.stdout
    )
