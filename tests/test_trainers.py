"""Trainers beside LLaMA-Factory on what `ktmoe.load_model` returns: transformers, TRL, and a loop by hand."""

import pytest
import torch
import trl.import_utils as trl_utils
from accelerate import Accelerator
from datasets import Dataset
from factory import save_model
from helpers import BF16_BACKENDS
from peft import LoraConfig
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file
from torch._dynamo.utils import counters
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, Trainer, TrainingArguments


# trl 0.24 reads (False, None), transformers 5's way to say that a package is not there, as that it is.
for name, found in list(vars(trl_utils).items()):
    if name.endswith("_available") and isinstance(found, tuple):
        setattr(trl_utils, name, found[0])

from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer  # noqa: E402

import ktmoe  # noqa: E402
from ktmoe import KTConfig, MoEExperts  # noqa: E402


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
every_backend = pytest.mark.parametrize("name", BF16_BACKENDS)


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


def plain(path, tokenizer, out, name="torch", **options):
    data = rows(tokenizer)
    args = TrainingArguments(str(out), **{**COMMON, **options})
    return Trainer(load(path, name), args, train_dataset=data, eval_dataset=data.select(range(4)))


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

    resumed = make(path, tokenizer, tmp_path / "resumed")
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


@pytest.mark.parametrize("name", BF16_BACKENDS[2:])
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


def batches(tokenizer):
    data = rows(tokenizer).with_format("torch")
    return DataLoader(data, batch_size=3, shuffle=True, generator=torch.Generator().manual_seed(0))


def loop(path, tokenizer, folder=None, resume=False):
    """Two epochs by hand; the state is saved after the first. Returns the losses and the adapter's parameters."""
    accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
    model = load(path)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer)
    model, optimizer, data, schedule = accelerator.prepare(model, optimizer, batches(tokenizer), schedule)
    if resume:
        accelerator.load_state(str(folder))
    found = []
    for epoch in range(2):
        for batch in data:
            if resume and epoch == 0:  # the sampler's generator moves on
                continue
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            found.append(loss.item())
        if folder and not resume and epoch == 0:
            accelerator.save_state(str(folder))
    return found, {n: p.detach() for n, p in accelerator.unwrap_model(model).named_parameters() if p.requires_grad}


def test_a_loop_by_hand_on_accelerate(path, tokenizer, tmp_path):
    """And accelerate's own checkpoints, which hold the expert LoRA under the names in memory."""
    found, parameters = loop(path, tokenizer, tmp_path / "state")
    assert sum(found[4:]) < sum(found[:4])
    assert all(p.any() for n, p in parameters.items() if ".experts." in n)
    again, resumed = loop(path, tokenizer, tmp_path / "state", resume=True)
    assert again == found[4:]
    same(resumed, parameters)


def test_loraplus_of_peft(path):
    """It sorts by name: the stacked B matrices get the larger rate."""
    model = load(path)
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-4, loraplus_lr_ratio=16)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert rates[id(p)] == pytest.approx(16e-4 if "lora_B" in name else 1e-4), name
    assert sum(".experts." in n and id(p) in rates for n, p in model.named_parameters()) == 2 * 6


@pytest.mark.slow
def test_the_rest_of_the_model_may_be_compiled(path, tokenizer, tmp_path):
    """The graph breaks at the experts; what TorchDynamo traces around them gives the same numbers."""
    found = {}
    for name, options in (("plain", {}), ("compiled", dict(torch_compile=True, torch_compile_backend="eager"))):
        torch._dynamo.reset()
        counters.clear()
        trainer = plain(path, tokenizer, tmp_path / name, max_steps=3, save_strategy="no", **options)
        trainer.train()
        found[name] = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert counters["stats"]["unique_graphs"] > 1
    assert found["compiled"] == found["plain"]


def checkpointing(model, mode):
    base = model.get_base_model()
    base.gradient_checkpointing_disable()
    if mode is not None:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": mode})


def step_gradients(model, ids, preference):
    """Gradients of one step; for a preference, with the reference pass between forward and backward, as DPO has it."""
    model.zero_grad()
    logits = model(ids).logits.float().log_softmax(-1).gather(2, ids.unsqueeze(2)).sum((1, 2))
    if preference:
        with torch.no_grad(), model.disable_adapter():
            expected = model(ids).logits.float().log_softmax(-1).gather(2, ids.unsqueeze(2)).sum((1, 2))
        chosen, rejected = (logits - expected).chunk(2)
        loss = -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)).mean()
    else:
        loss = -logits.mean()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


@every_backend
@pytest.mark.parametrize("preference", [False, True], ids=["SFT", "DPO"])
def test_checkpointing_gives_the_same_gradients(path, name, preference):
    """Bit for bit, by transformers' own checkpointing of decoder layers."""
    model = load(path, name, init_lora_weights="gaussian").train()
    model.enable_input_require_grads()
    for n, p in model.named_parameters():
        if "lora_B" in n:
            torch.nn.init.normal_(p, std=0.05)
    ids = torch.randint(2, 200, (4, 11), generator=torch.Generator().manual_seed(0))
    calls = []
    model.get_submodule("base_model.model.model.layers.0.mlp.experts").register_forward_pre_hook(
        lambda *_: calls.append(1)
    )
    checkpointing(model, None)
    expected = step_gradients(model, ids, preference)
    assert all(g.any() for g in expected.values())
    assert len(calls) == 1 + preference
    for mode in (True, False):
        calls.clear()
        checkpointing(model, mode)
        same(step_gradients(model, ids, preference), expected)
        assert len(calls) == 2 + preference
    close(model)
