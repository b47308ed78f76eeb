"""`load_model`: experts streamed from real checkpoints, whole, damaged and foreign ones."""

import json
import shutil

import families
import pytest
import torch
from families import FAMILIES, logits, model
from helpers import BF16_KERNELS, relative
from safetensors.torch import load_file, save_file
from test_models import REFERENCE, lora, moved
from transformers import AutoModelForCausalLM

import ktmoe
from ktmoe import KTConfig, KTError
from ktmoe.models import moe_layers


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A folder per family, in shards so small that a layer spreads over several."""
    made = {}

    def get(family="Qwen3-MoE"):
        if family not in made:
            whole = model(family)  # skips where the release lacks it
            made[family] = tmp_path_factory.mktemp(family)
            whole.save_pretrained(made[family], max_shard_size="100KB")
        return made[family]

    return get


@pytest.fixture
def folder(checkpoints, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(checkpoints(), tmp_path / "model")


@families.each
def test_equals_transformers(family, checkpoints):
    """A checkpoint as this release writes it: most families in the spelling that they are published in."""
    stock = families.load(family, checkpoints(family))
    streamed = ktmoe.load_model(checkpoints(family), REFERENCE, r=4)
    assert len(moe_layers(streamed)) == FAMILIES[family].moe_layers
    assert type(streamed) is type(stock)
    torch.testing.assert_close(logits(streamed), logits(stock), rtol=1e-5, atol=1e-5)
    same = {n: p for n, p in stock.named_parameters() if n in dict(streamed.named_parameters())}
    assert all(torch.equal(p, same[n]) for n, p in streamed.named_parameters())


@families.each
def test_stacked_experts_on_disk(family, tmp_path):
    """The names of the parameters in memory, as some families' checkpoints have them."""
    made = model(family)
    made.config.save_pretrained(tmp_path)
    save_file({k: v.clone() for k, v in made.state_dict().items()}, tmp_path / "model.safetensors", {"format": "pt"})
    streamed = ktmoe.load_model(tmp_path, REFERENCE, r=4)
    torch.testing.assert_close(logits(streamed), logits(families.mended(made)), rtol=1e-5, atol=1e-5)


def test_the_torch_backend_computes_from_the_file(checkpoints):
    """No copy of an expert: its tensors are views of the map, so nothing of them is anonymous memory."""
    streamed = ktmoe.load_model(checkpoints(), KTConfig(kt_backend="torch"), r=4)
    (before, _), *_ = [(m.weights.gate_proj[0].data_ptr(), m.load(4)) for m in moe_layers(streamed).values()]
    with open("/proc/self/maps") as maps:
        ranges = [line.split() for line in maps if ".safetensors" in line]
    spans = [tuple(int(end, 16) for end in line[0].split("-")) for line in ranges]
    assert any(low <= before < high for low, high in spans)


@pytest.mark.parametrize("name", BF16_KERNELS)
def test_the_kernel(name, checkpoints):
    stock = AutoModelForCausalLM.from_pretrained(checkpoints()).eval()
    streamed = ktmoe.load_model(
        checkpoints(), KTConfig(kt_backend=name, kt_num_threads=2), lora=lora("q_proj", "experts")
    )
    assert relative(logits(streamed), logits(stock)) < 0.05


def test_adapters_on_it(checkpoints, tmp_path):
    trained = moved(ktmoe.load_model(checkpoints(), REFERENCE, lora=lora("q_proj", "experts")))
    trained.save_pretrained(tmp_path)
    again = ktmoe.load_adapter(ktmoe.load_model(checkpoints(), REFERENCE, r=4), tmp_path)
    assert torch.equal(logits(again), logits(trained))


def test_it_neither_saves_nor_detaches(checkpoints, tmp_path):
    streamed = ktmoe.load_model(checkpoints(), REFERENCE, r=4)
    with pytest.raises(KTError, match="without experts"):
        streamed.save_pretrained(tmp_path)
    with pytest.raises(KTError, match="streamed from disk"):
        ktmoe.detach(streamed)


def test_a_checkpoint_without_the_head(checkpoints, tmp_path):
    """Base-model checkpoints have no `model.` before their keys."""
    stock = AutoModelForCausalLM.from_pretrained(checkpoints("Mixtral")).eval()
    stock.config.tie_word_embeddings = True
    stock.tie_weights()
    stock.model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    streamed = ktmoe.load_model(tmp_path, REFERENCE, r=4)
    torch.testing.assert_close(logits(streamed), logits(stock), rtol=1e-5, atol=1e-5)


def as_fp8(folder, block=32):
    """Turns the matrices of every layer into what DeepSeek-V3 is released as: FP8 with a scale for each block.

    Returns what they mean, as a state dict of bf16.
    """
    tensors, meant = {}, {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
        file.unlink()
    (folder / "model.safetensors.index.json").unlink()
    for key, value in list(tensors.items()):
        meant[key] = value.bfloat16()
        if not key.endswith("_proj.weight"):
            continue
        out, into = value.shape
        blocks = value.view(out // block, block, into // block, block)
        scale = blocks.abs().amax((1, 3)) / 448
        tensors[key] = (blocks / scale[:, None, :, None]).reshape(out, into).to(torch.float8_e4m3fn)
        tensors[f"{key}_scale_inv"] = scale
        meant[key] = (tensors[key].float() * scale.repeat_interleave(block, 0).repeat_interleave(block, 1)).bfloat16()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [block, block]}
    (folder / "config.json").write_text(json.dumps(config))
    return meant


def test_fp8_checkpoints(folder, tmp_path):
    """Inside the experts and outside, as the bf16 checkpoint that it stands for."""
    plain = shutil.copytree(folder, tmp_path / "plain", ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file(as_fp8(folder), plain / "model.safetensors", {"format": "pt"})
    expected = logits(ktmoe.load_model(plain, REFERENCE, r=4, dtype=torch.bfloat16))
    streamed = ktmoe.load_model(folder, REFERENCE, r=4)
    assert streamed.dtype == torch.bfloat16
    assert torch.equal(logits(streamed), expected)


def test_fp8_scales_of_another_block_size(folder):
    as_fp8(folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["weight_block_size"] = [64, 64]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(KTError, match=r"got \(2, 2\) for a matrix of \(64, 64\); expected \(1, 1\)"):
        ktmoe.load_model(folder, REFERENCE, r=4)


def shard_of(folder, key):
    return folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][key]


KEY = "model.layers.1.mlp.experts.2.up_proj.weight"


def rewrite(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def gone(folder):
    shard_of(folder, KEY).unlink()


def truncated(folder):
    file = shard_of(folder, KEY)
    file.write_bytes(file.read_bytes()[:-100])


def garbage(folder):
    shard_of(folder, KEY).write_bytes(b"no safetensors file" * 10)


def without_the_matrix(folder):
    rewrite(shard_of(folder, KEY), lambda tensors: tensors.pop(KEY))


def not_even_promised(folder):
    without_the_matrix(folder)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"][KEY]
    index.write_text(json.dumps(content))


def other_shape(folder):
    rewrite(shard_of(folder, KEY), lambda tensors: tensors.update({KEY: torch.zeros(32, 64)}))


def twice(folder):
    other = next(f for f in folder.glob("*.safetensors") if f != shard_of(folder, KEY))
    rewrite(other, lambda tensors: tensors.update({KEY: torch.zeros(64, 64)}))


def one_expert_more(folder):
    more = KEY.replace("experts.2", "experts.4")
    rewrite(shard_of(folder, KEY), lambda tensors: tensors.update({more: torch.zeros(64, 64)}))


def integers(folder):
    rewrite(shard_of(folder, KEY), lambda tensors: tensors.update({KEY: torch.zeros(64, 64, dtype=torch.int8)}))


def no_index(folder):
    (folder / "model.safetensors.index.json").unlink()


def bad_index(folder):
    (folder / "model.safetensors.index.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (gone, "shards are missing: model-"),
        (truncated, r"model-\S+: damaged"),
        (garbage, r"model-\S+: damaged"),
        (without_the_matrix, rf"promises 1 tensors.*{KEY} in model-"),
        (not_even_promised, "1 matrices of the routed experts are missing, e.g. model.layers.1.mlp.experts.2.up_proj"),
        (other_shape, rf"{KEY} is \(32, 64\); the model's configuration says \(64, 64\)"),
        (twice, f"{KEY} is in two files"),
        (one_expert_more, "too many, e.g. model.layers.1.mlp.experts.4.up_proj"),
        (integers, f"{KEY} is I8"),
        (no_index, "no weights that transformers reads"),
        (bad_index, "its index of shards cannot be read"),
    ],
)
def test_damaged_checkpoints(folder, damage, said):
    damage(folder)
    with pytest.raises(KTError, match=said):
        ktmoe.load_model(folder, REFERENCE, r=4)


def test_a_tensor_outside_the_experts_is_missing(folder):
    key = "model.layers.1.self_attn.q_proj.weight"
    rewrite(shard_of(folder, key), lambda tensors: tensors.pop(key))
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"][key]
    index.write_text(json.dumps(content))
    with pytest.raises(KTError, match=rf"1 tensors are missing.*{key}"):
        ktmoe.load_model(folder, REFERENCE, r=4)


def test_no_such_model(tmp_path):
    with pytest.raises(KTError, match="nowhere"):
        ktmoe.load_model(tmp_path / "nowhere", REFERENCE)


def test_options_that_do_not_stream(checkpoints):
    with pytest.raises(KTError, match="gguf_file"):
        ktmoe.load_model(checkpoints(), REFERENCE, gguf_file="model.gguf")
