"""Adapters with modules trained whole: resized embeddings, modules_to_save, single tokens. As stock peft has them."""

import json

import peft
import pytest
import torch
from families import IDS
from helpers import relative
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_models import REFERENCE, logits, lora, model, moved
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import ktmoe
from ktmoe import KTError
from ktmoe.models import attach


WHOLE = ["embed_tokens", "lm_head"]
HEAD = "base_model.model.lm_head"


def grown(rows=136):
    """The model after tokens were added; new rows are random, and other ones every time."""
    made = model()
    made.resize_token_embeddings(rows)
    return made


def trained(**options):
    options = dict(modules_to_save=WHOLE) | options
    return moved(attach(grown(), REFERENCE, lora=lora("q_proj", "experts", **options)))


def test_a_resized_vocabulary_as_stock_peft_loads_it(tmp_path):
    made = trained()
    made.save_pretrained(tmp_path, save_embedding_layers=True)
    keys = set(load_file(tmp_path / "adapter_model.safetensors"))
    assert {f"{HEAD}.weight", f"{HEAD}.original_module.weight", f"{HEAD}.modules_to_save.weight"} <= keys
    for trainable in (False, True):
        again = ktmoe.load_adapter(attach(grown(), REFERENCE), tmp_path, is_trainable=trainable)
        assert torch.equal(logits(again), logits(made))
        assert again.lm_head.modules_to_save["default"].weight.requires_grad == trainable
        with again.disable_adapter(), made.disable_adapter():  # the new rows come with the adapter
            assert torch.equal(logits(again), logits(made))
    if peft.__version__ >= "0.20":
        assert relative(logits(PeftModel.from_pretrained(grown(), tmp_path)), logits(made)) < 1e-6
    moved(made, seed=7)
    assert made.load_adapter(tmp_path, "default").unexpected_keys == []  # as load_best_model_at_end does
    assert torch.equal(logits(made), logits(again))
    again.save_pretrained(tmp_path / "again", save_embedding_layers=True)
    assert set(load_file(tmp_path / "again" / "adapter_model.safetensors")) == keys


def test_embeddings_that_were_resized_and_not_trained(tmp_path):
    made = moved(attach(grown(), REFERENCE, lora=lora("q_proj", "experts")))
    made.save_pretrained(tmp_path, save_embedding_layers=True)
    again = ktmoe.load_adapter(attach(grown(), REFERENCE), tmp_path)
    assert torch.equal(logits(again), logits(made))


def test_lora_on_embeddings_saved_whole(tmp_path):
    made = moved(attach(model(), REFERENCE, lora=lora("embed_tokens", "experts")))
    made.save_pretrained(tmp_path)
    assert "base_model.model.model.embed_tokens.base_layer.weight" in load_file(tmp_path / "adapter_model.safetensors")
    assert torch.equal(logits(ktmoe.load_adapter(attach(model(), REFERENCE), tmp_path)), logits(made))


def test_another_vocabulary_is_refused_with_the_remedy(tmp_path):
    trained().save_pretrained(tmp_path)
    base = attach(model(), REFERENCE)
    before = logits(base)
    with pytest.raises(
        KTError, match=r"\(136, 64\), expected \(128, 64\).*resize_token_embeddings\(136\).*add_tokens"
    ):
        ktmoe.load_adapter(base, tmp_path)
    assert torch.equal(logits(base), before)
    base.resize_token_embeddings(136)
    ktmoe.load_adapter(base, tmp_path)  # the remedy


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{HEAD}.weight"), r"Missing: \['base_model.model.lm_head.weight'\].*modules_to_save"),
        (lambda t: t.update({f"{HEAD}.modules_to_save.weight": torch.zeros(136, 64)}), "differ, and only one"),
        (lambda t: t.update({f"{HEAD}.bias": torch.zeros(136)}), r"not expected: \['base_model.model.lm_head.bias'\]"),
    ],
)
def test_a_file_that_is_not_whole_changes_nothing(change, message, tmp_path):
    trained().save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    base = attach(grown(), REFERENCE)
    before, modules = logits(base), {n: type(m) for n, m in base.named_modules()}
    with pytest.raises(KTError, match=message):
        ktmoe.load_adapter(base, tmp_path)
    assert torch.equal(logits(base), before)
    assert {n: type(m) for n, m in base.named_modules()} == modules
    there = trained()
    before = logits(there)
    with pytest.raises(KTError, match=message):
        there.load_adapter(tmp_path, "default")
    assert torch.equal(logits(there), before)


@pytest.mark.skipif(peft.__version__ < "0.20", reason="stock peft makes no such adapter here")
def test_single_tokens_trained_by_stock_peft(tmp_path):
    targets = ["q_proj", "gate_proj", "up_proj", "down_proj"]
    tokens = lora(*targets, trainable_token_indices={"embed_tokens": [0, 3, 5]})
    stock = moved(peft.get_peft_model(model(), tokens))
    stock.save_pretrained(tmp_path)
    mine = ktmoe.load_adapter(attach(model(), REFERENCE), tmp_path, is_trainable=True)
    assert relative(logits(mine), logits(stock)) < 1e-6
    delta = mine.model.model.embed_tokens.token_adapter.trainable_tokens_delta["default"]
    assert delta.requires_grad
    mine.load_adapter(tmp_path, "default")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["trainable_token_indices"] = {"embed_tokens": [0, 3, 6]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(KTError, match="trainable_token_indices"):
        mine.load_adapter(tmp_path, "default")


def test_another_scale_under_the_same_name_is_refused(tmp_path):
    made = trained()
    made.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 1}))
    with pytest.raises(KTError, match=r"is scaled by 0\.25, adapter 'default' of this model by 2"):
        made.load_adapter(tmp_path, "default")


def test_the_trainer_ends_with_its_best_model_and_goes_on(tmp_path):
    data = [{"input_ids": row, "labels": row} for row in IDS.repeat(4, 1)]
    options = dict(eval_strategy="steps", eval_steps=2, save_steps=2, load_best_model_at_end=True, use_cpu=True,
                   report_to="none", per_device_train_batch_size=2, learning_rate=1e-2)  # fmt: skip
    args = TrainingArguments(output_dir=str(tmp_path), max_steps=4, **options)
    made = trained()
    Trainer(made, args, train_dataset=data, eval_dataset=data).train()
    made.save_pretrained(tmp_path / "best")
    assert torch.equal(logits(ktmoe.load_adapter(attach(grown(), REFERENCE), tmp_path / "best")), logits(made))
    again = ktmoe.load_adapter(attach(grown(), REFERENCE), tmp_path / "checkpoint-2", is_trainable=True)
    args.max_steps = 6
    Trainer(again, args, train_dataset=data, eval_dataset=data).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-4")
    )


def test_a_module_trained_whole_is_merged(tmp_path):
    made = moved(attach(model(), REFERENCE, lora=lora("q_proj", "experts", modules_to_save=["lm_head"])))
    made.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    model().save_pretrained(tmp_path / "model")
    ktmoe.merge_adapter(tmp_path / "model", tmp_path / "adapter", tmp_path / "merged")
    assert relative(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), logits(made)) < 1e-5
