"""Adapters that hold more than LoRA, or lie in more than one file, through LLaMA-Factory: train, go on, chat."""

import shutil

import pytest
import torch
from factory import Workspace
from safetensors.torch import load_file, save_file

from ktmoe import KTError
from ktmoe.adapters.beside import EXPERTS_FILE


ADDED = {"add_tokens": "<one>,<two>", "resize_vocab": True}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return Workspace(tmp_path_factory.mktemp("factory"), steps=4)


@pytest.fixture(scope="module")
def with_tokens(workspace):
    """A run whose vocabulary grew, which ended with its best model."""
    keys = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "eval_dataset": "rows"}
    workspace.run("tokens", **ADDED, **keys)
    return workspace.root / "tokens"


def chat(workspace, **keys):
    from llamafactory.chat import ChatModel

    config = {"model_name_or_path": str(workspace.model), "template": "default", "infer_dtype": "float32", **keys}
    model = ChatModel({**config, "do_sample": False, "max_new_tokens": 4, "use_kt": True, "kt_backend": "reference"})
    model.chat([{"role": "user", "content": "count 3"}])
    return model.engine.model


def test_a_run_with_new_tokens_is_used_and_gone_on_with(workspace, with_tokens):
    saved = load_file(with_tokens / "adapter_model.safetensors")
    trained = {"adapter_name_or_path": str(with_tokens)}
    talking = chat(workspace, **trained, **ADDED)
    head = saved["base_model.model.lm_head.weight"]
    assert torch.equal(talking.get_output_embeddings().weight.bfloat16(), head.bfloat16())
    workspace.run("more", **trained, **ADDED, max_steps=2)
    again = load_file(workspace.root / "more" / "adapter_model.safetensors")
    assert {k: v.shape for k, v in again.items()} == {k: v.shape for k, v in saved.items()}
    shutil.copytree(with_tokens / "checkpoint-2", workspace.root / "resumed" / "checkpoint-2")
    losses = workspace.run("resumed", **ADDED, resume_from_checkpoint=str(workspace.root / "resumed" / "checkpoint-2"))
    assert max(losses) == 4


def test_without_the_keys_one_sentence(workspace, with_tokens):
    with pytest.raises(KTError, match="add_tokens"):
        chat(workspace, adapter_name_or_path=str(with_tokens))


def test_the_forked_stack_s_adapter(workspace, tmp_path):
    workspace.run("plain")
    whole = load_file(workspace.root / "plain" / "adapter_model.safetensors")
    shutil.copytree(workspace.root / "plain", tmp_path / "forked", ignore=shutil.ignore_patterns("checkpoint-*"))
    stacks = {}
    for layer in range(2):
        for part in ("gate", "up", "down"):
            for side in "AB":
                every = [
                    whole[f"base_model.model.model.layers.{layer}.mlp.experts.{e}.{part}_proj.lora_{side}.weight"]
                    for e in range(4)
                ]
                stacks[f"layers.{layer}.experts.{part}_lora_{side.lower()}"] = torch.stack(every)
    rest = {k: v for k, v in whole.items() if ".experts." not in k}
    save_file(rest, tmp_path / "forked" / "adapter_model.safetensors", metadata={"format": "pt"})
    save_file(stacks, tmp_path / "forked" / EXPERTS_FILE)
    forked = {"adapter_name_or_path": str(tmp_path / "forked")}
    talking = chat(workspace, **forked)
    ids = torch.arange(12)[None]
    expected = chat(workspace, adapter_name_or_path=str(workspace.root / "plain"))(input_ids=ids).logits
    assert torch.equal(talking(input_ids=ids).logits, expected)
    found = workspace.run("on-forked", **forked, max_steps=2)
    assert found == pytest.approx(
        workspace.run("on-plain", adapter_name_or_path=str(workspace.root / "plain"), max_steps=2), rel=1e-4
    )
    assert not (workspace.root / "on-forked" / EXPERTS_FILE).exists()

    from llamafactory.chat import ChatModel

    with pytest.raises(KTError, match="Write use_kt: true"):  # stock peft would leave them out without a word
        ChatModel({"model_name_or_path": str(workspace.model), "template": "default", **forked})
