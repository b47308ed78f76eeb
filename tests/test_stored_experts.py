"""Models whose routed experts are released in FP8 or INT4: read, computed, trained and merged as what they mean."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from families import model
from helpers import relative, train_on
from ktmoe_reference import quantize_int4
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

import ktmoe
from ktmoe import KTConfig, KTError
from ktmoe.checkpoints.reader import Checkpoint
from ktmoe.cli import app
from ktmoe.convert import quantize_int4_model
from ktmoe.models import moe_layers, summary
from ktmoe.verify.stored_model import store_experts


OWN = {"fp8": "AMXFP8", "int4": "AMXInt4"}
SIZES = {  # of DeepSeek-V3: the first layer is dense
    "hidden_size": 128,
    "moe_intermediate_size": 128,
    "intermediate_size": 256,
    "num_experts_per_tok": 2,
    "n_routed_experts": 8,
    "n_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 6.0,  # so that the routed experts decide
}
LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["q_a_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
IDS = torch.arange(48).remainder(7).view(2, 24) + 1
every_format = pytest.mark.parametrize("stored", OWN)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """By format: the model as it is released, and beside it (`plain`) what its numbers mean, in bf16."""
    root = tmp_path_factory.mktemp("models")
    model("DeepSeek-V3", torch.bfloat16, **SIZES).save_pretrained(root / "bf16")
    assert [write_stored(root, stored) for stored in OWN] == [2 * 8 * 3] * 2
    return root


def write_stored(root, stored):
    """Beside `bf16`: the model in a format, and what its numbers mean (`plain`). Returns how many matrices."""
    store_experts(shutil.copytree(root / "bf16", root / stored), stored)
    plain = shutil.copytree(root / "bf16", root / f"{stored} plain")
    tensors, checkpoint = load_file(plain / "model.safetensors"), Checkpoint(root / stored)
    tensors |= {key: checkpoint.dequantise(key) for key in checkpoint.stored_keys()}
    save_file(tensors, plain / "model.safetensors", {"format": "pt"})
    return len(checkpoint.stored_keys())


@pytest.fixture
def library():
    """compressed-tensors' own compression and decompression of a layer."""
    compressors = pytest.importorskip(
        "compressed_tensors.compressors", reason="compressed-tensors is not installed: it needs Python 3.11"
    )
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    weights = QuantizationArgs(num_bits=4, strategy="group", group_size=32, symmetric=True)
    scheme, compressor = (
        QuantizationScheme(targets=["Linear"], weights=weights),
        compressors.PackedQuantizationCompressor,
    )
    return SimpleNamespace(
        compress=lambda state: compressor.compress(state, scheme),
        decompress=lambda state: compressor.decompress(state, scheme)["weight"],
    )


@pytest.fixture
def folder(folders, stored, tmp_path):
    return shutil.copytree(folders / stored, tmp_path / "model")


def config(backend, **options):
    return KTConfig(kt_backend=backend, kt_num_threads=1, kt_max_len=64, **options)


def backends(stored):
    return [*("reference", "torch"), pytest.param(OWN[stored], marks=pytest.mark.kernel)]


EVERY = [pytest.param(s, *getattr(b, "values", (b,)), marks=getattr(b, "marks", ())) for s in OWN for b in backends(s)]


@torch.no_grad()
def logits(tuned):
    return tuned(input_ids=IDS).logits.float()


@pytest.mark.parametrize(("stored", "backend"), EVERY)
def test_it_computes_what_transformers_computes_with_the_dequantised_model(folders, stored, backend):
    expected = logits(AutoModelForCausalLM.from_pretrained(folders / f"{stored} plain", dtype=torch.bfloat16))
    got = logits(ktmoe.load_model(folders / stored, config(backend), r=4))
    assert relative(got, expected) < 0.02
    away = logits(AutoModelForCausalLM.from_pretrained(folders / "bf16", dtype=torch.bfloat16))
    assert relative(expected, away) > 0.02  # what the format itself does to drawn weights


@pytest.mark.parametrize(("stored", "backend"), EVERY)
def test_training_follows_the_reference(folders, stored, backend):
    """On the same checkpoint, from the same adapter, twenty steps."""

    def curve(name, path):
        torch.manual_seed(0)
        tuned = ktmoe.load_model(path, config(name), lora=LORA)
        return torch.tensor(train_on(tuned, IDS, 20, lr=2e-3))

    expected = curve("reference", folders / f"{stored} plain")
    assert expected[-1] < 0.9 * expected[0]
    assert (curve(backend, folders / stored) - expected).abs().max() < 0.02 * expected[0]


@pytest.mark.kernel
@every_format
def test_auto_takes_the_checkpoints_own_format(folders, stored, recwarn):
    """Layers too small to be worth a measurement."""
    tuned = ktmoe.load_model(folders / stored, KTConfig(), r=4)
    assert f" GB of {stored.upper()} weights in host memory" in summary(tuned)[1]
    assert {experts.plan.backend for experts in moe_layers(tuned).values()} == {OWN[stored]}


@pytest.mark.parametrize("name", OWN.values())
def test_a_bf16_model_is_not_quantised_unasked(folders, name):
    """Before transformers loads anything; on hosts without a kernel too."""
    with pytest.raises(KTError, match=rf"kt_backend: {name} takes experts that the checkpoint holds in (FP8|INT4)"):
        ktmoe.load_model(folders / "bf16", config(name), r=4)


@every_format
def test_damaged_scales_are_refused(folder, stored):
    file, name = folder / "model.safetensors", {"fp8": "_scale_inv", "int4": "_scale"}[stored]
    tensors = load_file(file)
    key = next(k for k in tensors if k.endswith(f"experts.3.up_proj.weight{name}"))
    tensors[key][0, 0] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(KTError, match="the scales of expert 3 hold NaN or infinite numbers"):
        ktmoe.load_model(folder, config("torch"), r=4)


@pytest.mark.parametrize("stored", ["int4"])
@pytest.mark.parametrize("change", ["scale missing", "scale of another shape", "words of another type"])
def test_damaged_int4_files_are_refused(folder, stored, change):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    key = next(k for k in tensors if k.endswith("experts.3.up_proj.weight_packed"))
    scale = key.replace("_packed", "_scale")
    if change == "scale missing":
        del tensors[scale]
    elif change == "scale of another shape":
        tensors[scale] = tensors[scale][:, :-1].contiguous()
    else:
        tensors[key] = tensors[key].view(torch.uint8)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(KTError, match=r"expected I32 and BF16 \(128, (4|16)\), eight numbers to a word"):
        ktmoe.load_model(folder, config("torch"), r=4)


VARIANTS = {
    "8 bits": ({"num_bits": 8}, {}, "num_bits: 8"),
    "another group": ({"group_size": 128}, {}, "group_size: 128"),
    "a scale per channel": ({"strategy": "channel", "group_size": None}, {}, "strategy: channel"),
    "zero points": ({"symmetric": False}, {}, "symmetric: False"),
    "another order of columns": ({"actorder": "group"}, {}, "actorder: group"),
    "floating point": ({"type": "float"}, {}, "type: float"),
    "quantised inputs": ({}, {"input_activations": {"num_bits": 8}}, "input_activations"),
}


@pytest.mark.parametrize("stored", ["int4"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_other_variants_are_refused_by_name(folder, stored, variant, monkeypatch):
    weights, group, said = VARIANTS[variant]
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)  # nothing is loaded
    path = folder / "config.json"
    content = json.loads(path.read_text())
    held = content["quantization_config"]["config_groups"]["group_0"]
    held |= {"weights": held["weights"] | weights, **group}
    path.write_text(json.dumps(content))
    with pytest.raises(KTError, match=rf"quantised \(compressed-tensors, {said}\); expected .*INT4 in groups of 32"):
        ktmoe.load_model(folder, config("torch"), r=4)


@pytest.mark.parametrize("stored", ["int4"])
def test_what_the_real_library_writes_is_what_it_reads(folder, stored, library):
    """Everywhere: its own numbers in the place of ours in the experts, and in a layer outside of them."""
    file = folder / "model.safetensors"
    tensors, meant, g = load_file(file), {}, torch.Generator().manual_seed(0)
    for key in [k for k in tensors if k.endswith(("_packed", "o_proj.weight"))]:
        name = key.removesuffix("_packed")
        out, width = tensors.pop(key).shape
        weight = torch.randn(out, width * (8 if key != name else 1), generator=g).mul_(0.1).bfloat16()
        state = {"weight": weight, "weight_scale": quantize_int4(weight)[1]}
        compressed = library.compress(state)
        tensors |= {name.replace("weight", k): v for k, v in compressed.items()}
        meant[name] = library.decompress(compressed)
    save_file(tensors, file, {"format": "pt"})
    checkpoint = Checkpoint(folder)
    assert sorted(checkpoint.stored_keys()) == sorted(meant)
    assert all(torch.equal(checkpoint.dequantise(key), value.bfloat16()) for key, value in meant.items())
    tuned = ktmoe.load_model(folder, config("torch"), r=4)
    held = tuned.state_dict()["model.layers.0.self_attn.o_proj.weight"]
    assert torch.equal(held, meant["model.layers.0.self_attn.o_proj.weight"].bfloat16())


@every_format
def test_merging_writes_bf16_and_says_so(folders, folder, stored, tmp_path):
    tuned = ktmoe.load_model(folder, config("reference"), lora=LORA)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_().mul_(0.05)
    expected = logits(tuned)
    tuned.save_pretrained(tmp_path / "adapter")
    done = ktmoe.merge_adapter(folder, tmp_path / "adapter", tmp_path / "merged")
    assert "48 quantised matrices became bf16" in str(done)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.bfloat16)
    assert not hasattr(merged.config, "quantization_config")
    assert relative(logits(merged), expected) < 0.03


def test_any_model_is_quantised_to_int4(folders, tmp_path, library):
    """Into what the real library reads, and what is trained as any INT4 checkpoint."""
    made = CliRunner().invoke(app, ["quantize", str(folders / "bf16"), str(tmp_path / "out"), "--format", "int4"])
    assert made.exit_code == 0, made.output
    assert "48 matrices of 2 layers in INT4" in made.stdout
    checkpoint, before = Checkpoint(tmp_path / "out"), load_file(folders / "bf16" / "model.safetensors")
    assert len(checkpoint.stored_keys()) == 48
    written = load_file(tmp_path / "out" / "model.safetensors")
    for key, tensor in before.items():
        if key not in checkpoint.stored_keys():
            assert torch.equal(written[key], tensor)
            continue
        state = {f"weight_{part}": written[f"{key}_{part}"] for part in ("packed", "scale", "shape")}
        theirs = library.decompress(state).float()
        assert torch.equal(checkpoint.dequantise(key).float(), theirs.bfloat16().float())
        assert relative(theirs, tensor.float()) < 0.12  # what rounding to 16 numbers does
    expected = logits(ktmoe.load_model(folders / "int4", config("reference"), r=4))
    assert torch.equal(logits(ktmoe.load_model(tmp_path / "out", config("reference"), r=4)), expected)


@every_format
def test_what_is_quantised_is_not_quantised_again(folders, stored, tmp_path):
    with pytest.raises(KTError, match="quantised already"):
        quantize_int4_model(folders / stored, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_quantised_to_int4_is_refused(folders, tmp_path):
    """And leaves nothing behind."""
    made = CliRunner().invoke(
        app, ["quantize", str(folders / "bf16"), str(tmp_path / "out"), "--format", "int4", "--tp", "2"]
    )
    assert made.exit_code == 2
    assert "--tp and --threads are for int8" in made.stderr
    damaged = shutil.copytree(folders / "bf16", tmp_path / "damaged")
    tensors = load_file(damaged / "model.safetensors")
    key = next(k for k in tensors if k.endswith("experts.3.up_proj.weight"))
    tensors[key][5, 7] = float("nan")
    save_file(tensors, damaged / "model.safetensors", {"format": "pt"})
    with pytest.raises(KTError, match=rf"{key}: holds NaN"):
        quantize_int4_model(damaged, tmp_path / "out")
    whole = AutoModelForCausalLM.from_pretrained(folders / "bf16", dtype=torch.bfloat16)
    if "model.layers.1.mlp.experts.gate_up_proj" in whole.state_dict():  # transformers 5
        held = {k: v.clone() for k, v in whole.state_dict().items()}
        save_file(held, damaged / "model.safetensors", {"format": "pt"})
        with pytest.raises(KTError, match="holds all experts of a layer"):
            quantize_int4_model(damaged, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["damaged"]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """LLaMA-Factory's, with its model in sizes that every format takes, in bf16 and as `write_stored` has it."""
    factory = pytest.importorskip("factory")
    pytest.importorskip("llamafactory")
    made = factory.Workspace(tmp_path_factory.mktemp("stored"))
    sizes = AutoConfig.from_pretrained(made.model, hidden_size=128, moe_intermediate_size=128)
    torch.manual_seed(0)
    shutil.copytree(made.model, made.root / "bf16", ignore=shutil.ignore_patterns("*.safetensors"))
    AutoModelForCausalLM.from_config(sizes, dtype=torch.bfloat16).save_pretrained(made.root / "bf16")
    for stored in OWN:
        write_stored(made.root, stored)
    return made


@pytest.mark.parametrize(("stored", "backend"), EVERY)
def test_through_llama_factory(workspace, stored, backend):
    """As the same run on what the numbers mean."""
    folder, plain = (str(workspace.root / name) for name in (stored, f"{stored} plain"))
    mine = workspace.run(f"{stored} {backend}", model_name_or_path=folder, kt_backend=backend, kt_num_threads=1)
    expected = workspace.run(f"{stored} expected", model_name_or_path=plain, kt_backend="reference")
    assert max(abs(mine[step] - expected[step]) for step in expected) < 0.02 * expected[1]


@pytest.mark.parametrize("name", OWN.values())
def test_llama_factory_refuses_a_bf16_model_too(workspace, name):
    with pytest.raises(KTError, match=f"kt_backend: {name} takes experts that the checkpoint holds"):
        workspace.run("refused", model_name_or_path=str(workspace.root / "bf16"), kt_backend=name)


@pytest.mark.kernel
def test_auto_leaves_int4_for_ranks_that_it_does_not_take(folders, monkeypatch):
    """With the reason, and not with a key that `auto` itself has set since."""
    monkeypatch.setattr("ktmoe.notices._said", set())
    with pytest.warns(UserWarning, match=r"lora_rank\): got 16; kt_backend: AMXInt4 takes 1 to 8"):
        tuned = ktmoe.load_model(folders / "int4", KTConfig(), r=16)
    assert {experts.plan.backend for experts in moe_layers(tuned).values()} == {"AMXBF16"}


@pytest.mark.kernel
def test_int4_takes_rank_8_at_most(folders):
    with pytest.raises(KTError, match=r"lora_rank\): got 16; kt_backend: AMXInt4 takes 1 to 8"):
        ktmoe.load_model(folders / "int4", config("AMXInt4"), r=16)


def test_every_fp8_number_is_what_torch_says():
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).view(1, 16, 16)
    got = ktmoe.BlockFP8(every, torch.full((1, 1, 1), 3.0)).rows(0, 0, 16)
    assert got.isnan().sum() == 2
    assert torch.equal(got.nan_to_num(1e9), (every[0].float() * 3.0).nan_to_num(1e9))
