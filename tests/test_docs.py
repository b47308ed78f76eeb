"""What the documentation says of the code: examples that run, a tree that names every file."""

import doctest

import peft
import pytest
import torch
import transformers

import ktmoe
from ktmoe.models import expert_shapes
from ktmoe.shapes import SHAPES


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """A model and an adapter on disk, under the names that the examples use."""
    folder = tmp_path_factory.mktemp("docs")
    config = transformers.MixtralConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=64, num_local_experts=4,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.MixtralForCausalLM(config).bfloat16().save_pretrained(folder / "model")
    lora = peft.LoraConfig(target_modules=["experts", "q_proj"])
    model = ktmoe.load_model(folder / "model", ktmoe.KTConfig(kt_backend="torch"), lora=lora)
    model.save_pretrained(str(folder / "adapter"))
    return {"model_path": str(folder / "model"), "adapter_path": str(folder / "adapter")}


@pytest.mark.parametrize("name", ktmoe.__all__)
def test_the_example_of_every_public_name_runs(name, paths, tmp_path, monkeypatch):
    monkeypatch.setenv("KTMOE_CACHE_DIR", str(tmp_path / "cache"))
    globs = {"ktmoe": ktmoe, "peft": peft, "torch": torch, "transformers": transformers, **paths}
    globs["new_path"] = str(tmp_path / "new")
    found = [t for t in doctest.DocTestFinder(recurse=False).find(getattr(ktmoe, name), name, globs=globs)]
    assert any(test.examples for test in found), f"{name} has no example in its docstring"
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    said = []
    for test in found:
        runner.run(test, out=said.append)
    assert not runner.failures, "".join(said)


def test_shapes_are_those_of_the_models():
    """Against the defaults of transformers' configurations, which are these models' own."""
    for name, config in (
        ("Mixtral-8x7B", transformers.MixtralConfig()),
        ("DeepSeek-V3", transformers.DeepseekV3Config()),
        ("Qwen3-30B-A3B", transformers.Qwen3MoeConfig()),
    ):
        (shape,) = expert_shapes(config, 8)
        assert shape == SHAPES[name]
