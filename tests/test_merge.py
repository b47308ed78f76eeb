"""Merging: in memory as peft users do it, and on disk into a checkpoint that stock transformers loads."""

import json
import shutil
import weakref

import peft
import pytest
import torch
from helpers import BF16_KERNELS, relative
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_adapter_files import LAYOUTS, stock_reads
from test_loading import as_fp8
from test_models import FAMILIES, REFERENCE, logits, lora, model, moved
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import ktmoe
from ktmoe import KernelError, KTConfig, KTError, cli
from ktmoe.adapters.layer import LoraExperts
from ktmoe.checkpoints.names import ExpertKey
from ktmoe.convert import changes, writing
from ktmoe.gate import gate
from ktmoe.models import attach, detach, moe_layers
from ktmoe.types import Lora


BOTH = dict(target_modules=["q_proj", "experts"])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Per family: a checkpoint in small shards, an adapter on everything linear, and the logits of both together."""
    made = {}

    def get(family="Qwen3-MoE"):
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            model(family).save_pretrained(folder / "base", max_shard_size="100KB")
            (folder / "base" / "tokenizer.json").write_text("{}")
            adapted = moved(attach(model(family), REFERENCE, lora=lora(target_modules="all-linear")))
            adapted.save_pretrained(folder / "adapter")
            made[family] = folder, logits(adapted)
        return made[family]

    return get


@pytest.fixture
def copied(trained, tmp_path):
    """A base and an adapter that a test may damage."""
    shutil.copytree(trained()[0], tmp_path, dirs_exist_ok=True)
    return tmp_path


# --- in memory ---


def in_memory(tmp_path, streamed, **options):
    """A fresh model with a moved adapter; its experts from memory, or streamed from a file."""
    if not streamed:
        return moved(attach(model(), REFERENCE, lora=lora(**BOTH | options)))
    model().save_pretrained(tmp_path / "streamed")
    return moved(ktmoe.load_model(tmp_path / "streamed", REFERENCE, lora=lora(**BOTH | options)))


@pytest.mark.parametrize("streamed", [False, True])
def test_merge_unmerge_and_disable(streamed, tmp_path):
    made = in_memory(tmp_path, streamed)
    adapted = logits(made)
    with made.disable_adapter():
        base = logits(made)
    made.merge_adapter()
    experts = next(m for m in made.modules() if isinstance(m, LoraExperts))
    assert experts.merged_adapters == ["default"]
    assert relative(logits(made), adapted) < 1e-6
    with pytest.warns(UserWarning, match="already merged"):
        made.merge_adapter()
    assert relative(logits(made), adapted) < 1e-6
    made.unmerge_adapter()
    assert not experts.merged
    assert relative(logits(made), adapted) < 1e-6
    made.merge_adapter()
    with made.disable_adapter():  # takes it out, as peft's own layers do
        assert relative(logits(made), base) < 1e-6
    assert relative(logits(made), adapted) < 1e-6


def test_unmerging_streamed_experts_is_exact_and_files_are_not_written_to(tmp_path):
    made = in_memory(tmp_path, streamed=True)
    layers = moe_layers(made)
    before = {n: [m.weights.gate_proj[e].clone() for e in range(4)] for n, m in layers.items()}
    sources = {n: m.weights for n, m in layers.items()}
    file = (tmp_path / "streamed" / "model.safetensors").read_bytes()
    made.merge_adapter()
    for n, m in layers.items():
        assert m.weights is not sources[n]
        assert not any(torch.equal(m.weights.gate_proj[e], before[n][e]) for e in range(4))
        assert all(torch.equal(sources[n].gate_proj[e], before[n][e]) for e in range(4))
    made.unmerge_adapter()
    assert all(m.weights is sources[n] for n, m in layers.items())
    assert (tmp_path / "streamed" / "model.safetensors").read_bytes() == file


def test_an_attached_model_is_merged_in_place_and_comes_off(tmp_path):
    """As peft does with its own layers: the parameters of transformers' modules hold the merged weights."""
    stock = model()
    made = moved(attach(stock, REFERENCE, lora=lora(**BOTH)))
    adapted = logits(made)
    bare = made.merge_and_unload()
    assert bare is stock
    assert not any(isinstance(m, LoraExperts) for m in bare.modules())
    assert len(moe_layers(bare)) == 3
    assert relative(logits(bare), adapted) < 1e-6
    plain = detach(bare)
    assert relative(logits(plain), adapted) < 1e-6
    plain.save_pretrained(tmp_path)
    assert relative(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), adapted) < 1e-6


def test_a_merged_streamed_model_takes_the_next_adapter(tmp_path):
    made = in_memory(tmp_path, streamed=True)
    adapted = logits(made)
    again = moved(ktmoe.get_peft_model(made.merge_and_unload(), lora(**BOTH)), seed=3)
    with again.disable_adapter():
        assert relative(logits(again), adapted) < 1e-6
    again.merge_adapter()
    again.unmerge_adapter()
    with again.disable_adapter():
        assert relative(logits(again), adapted) < 1e-6


@pytest.mark.parametrize("streamed", [False, True])
def test_two_adapters_are_merged_as_they_add_up(streamed, tmp_path):
    made = in_memory(tmp_path, streamed)
    made.add_adapter("other", lora("experts", "q_proj", r=2, use_rslora=True))
    made.set_adapter("other")
    moved(made, seed=1)
    alone = logits(made)
    made.base_model.set_adapter(["default", "other"])
    both = logits(made)
    made.merge_adapter(["other"])
    assert relative(logits(made), alone) < 1e-6  # merged: nothing is added, as in peft
    with pytest.warns(UserWarning, match="Already following adapters were merged"):
        made.merge_adapter()
    assert relative(logits(made), both) < 1e-6
    with pytest.raises(KTError, match=r"adapter_names: got 'third'; this model has default, other"):
        made.merge_adapter(["third"])
    made.unmerge_adapter()
    made.delete_adapter("other")
    made.set_adapter("default")
    with pytest.raises(KTError, match=r"add_weighted_adapter.*base_model\.set_adapter"):
        made.add_weighted_adapter(["default"], [0.5], "half")
    assert list(made.peft_config) == ["default"]


@pytest.mark.parametrize("streamed", [False, True])
def test_safe_merge_refuses_before_anything_is_merged(streamed, tmp_path):
    made = in_memory(tmp_path, streamed)
    layer = made.get_submodule("base_model.model.model.layers.2.mlp.experts")
    good = layer.lora_B["default"]["down_proj"].data.clone()
    layer.lora_B["default"]["down_proj"].data[1, 0, 0] = float("nan")
    q_proj = made.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    weight = q_proj.base_layer.weight.clone()
    for merging in (made.merge_and_unload, made.merge_adapter):
        with pytest.raises(KTError, match=r"layers\.2\.mlp\.experts, down_proj of expert 1: .* NaN"):
            merging(safe_merge=True)
    assert torch.equal(q_proj.base_layer.weight, weight)
    assert not any(m.merged for m in made.modules() if isinstance(m, LoraExperts))
    layer.lora_B["default"]["down_proj"].data = good
    adapted = logits(made)
    assert relative(logits(made.merge_and_unload(safe_merge=True)), adapted) < 1e-6


@pytest.mark.parametrize("name", BF16_KERNELS)
def test_the_kernel_is_loaded_and_probed_again(name, monkeypatch):
    config = KTConfig(kt_backend=name, kt_max_len=64, kt_num_threads=2)
    made = moved(attach(model(dtype=torch.bfloat16), config, lora=lora("experts")))
    adapted, probed = logits(made), []
    problems = gate.probe_problems
    monkeypatch.setattr(gate, "probe_problems", lambda *args: probed.append(1) or problems(*args))
    bare = made.merge_and_unload()
    assert len(probed) == 3
    assert relative(logits(bare), adapted) < (0.02 if name == "AMXBF16" else 0.1)


@pytest.mark.parametrize("name", BF16_KERNELS)
def test_a_kernel_that_fails_on_merged_weights_leaves_the_old_ones(name, monkeypatch):
    config = KTConfig(kt_backend=name, kt_max_len=64, kt_num_threads=2)
    made = moved(attach(model(dtype=torch.bfloat16), config, lora=lora("experts")))
    before = logits(made)
    monkeypatch.setattr(gate, "probe_problems", lambda *args: ["output of expert 1: wrong"])
    with pytest.raises(KernelError, match="expert 1: wrong"):
        made.merge_adapter()
    monkeypatch.undo()
    assert not any(m.merged for m in made.modules() if isinstance(m, LoraExperts))
    assert relative(logits(made), before) < 0.02  # in place: up to the rounding of bf16


# --- on disk ---


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_checkpoint_is_a_plain_one(family, trained, tmp_path):
    folder, adapted = trained(family)
    done = ktmoe.merge_adapter(folder / "base", folder / "adapter", tmp_path / "out")
    assert relative(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), adapted) < 1e-5
    assert done.layers == (2 if "DeepSeek" in family else 3)
    assert done.counts["experts"] == done.layers * 4 * 3
    assert done.counts["attention"] == (15 if family == "DeepSeek-V3" else 12)  # two matrices for its queries
    assert done.counts.get("shared experts", 0) == {"DeepSeek-V2-Lite": 6, "DeepSeek-V3": 6, "Qwen2-MoE": 12}.get(
        family, 0
    )
    names = {p.name for p in (folder / "base").iterdir()}
    assert {p.name for p in (tmp_path / "out").iterdir()} == names
    assert len([n for n in names if n.endswith(".safetensors")]) == done.shards > 3
    for name in names:
        old, new = folder / "base" / name, tmp_path / "out" / name
        if name.endswith(".safetensors"):
            with safe_open(old, "pt") as a, safe_open(new, "pt") as b:
                assert a.metadata() == b.metadata()
                assert {k: a.get_slice(k).get_shape() for k in a.keys()} == {
                    k: b.get_slice(k).get_shape() for k in b.keys()
                }
        elif not name.endswith("index.json"):
            assert old.read_bytes() == new.read_bytes()
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert (
        index["weight_map"] == json.loads((folder / "base" / "model.safetensors.index.json").read_text())["weight_map"]
    )
    assert index["metadata"]["total_size"] == done.nbytes


def test_stacked_experts_and_one_file(trained, tmp_path):
    folder, adapted = trained()
    stock = AutoModelForCausalLM.from_pretrained(folder / "base")
    (tmp_path / "base").mkdir()
    tensors = {k: v.clone() for k, v in stock.state_dict().items()}
    assert "model.layers.0.mlp.experts.gate_up_proj" in tensors
    save_file(tensors, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    shutil.copy(folder / "base" / "config.json", tmp_path / "base")
    done = ktmoe.merge_adapter(tmp_path / "base", folder / "adapter", tmp_path / "out")
    assert done.counts["experts"] == 36
    assert relative(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), adapted) < 1e-5


def test_stacked_experts_that_are_turned_on_disk():
    """[E, in, out], as older checkpoints of some families: what is added is turned too."""
    g = torch.Generator().manual_seed(0)
    tensors = {}
    for p, (i, o) in (("gate_proj", (6, 4)), ("up_proj", (6, 4)), ("down_proj", (4, 6))):
        tensors |= {f"{p}.lora_A": torch.randn(3, 2, i, generator=g), f"{p}.lora_B": torch.randn(3, o, 2, generator=g)}
    both = Lora(tensors, 0.5)
    place = ExpertKey("x", "gate_up_proj", None, transposed=None)
    for shape, turned in (((3, 6, 8), True), ((3, 8, 6), False)):
        change, kind, count = changes._expert_change(shape, place, both)
        assert (kind, count) == ("experts", 6)
        whole = change(torch.zeros(shape[1:]), 2)
        expected = torch.cat([both.delta("gate_proj", 2), both.delta("up_proj", 2)])
        assert torch.equal(whole, expected.T if turned else expected)


def test_fp8_becomes_bf16(copied, trained):
    plain = as_fp8(copied / "base")
    (copied / "plain").mkdir()
    save_file(plain, copied / "plain" / "model.safetensors", {"format": "pt"})
    config = json.loads((copied / "base" / "config.json").read_text())
    del config["quantization_config"]
    (copied / "plain" / "config.json").write_text(json.dumps(config))
    done = ktmoe.merge_adapter(copied / "base", copied / "adapter", copied / "out")
    ktmoe.merge_adapter(copied / "plain", copied / "adapter", copied / "expected")
    assert done.dequantised > 36
    assert "quantised matrices became bf16" in str(done)
    assert "quantization_config" not in json.loads((copied / "out" / "config.json").read_text())
    found, expected = (
        AutoModelForCausalLM.from_pretrained(copied / n, dtype=torch.float32) for n in ("out", "expected")
    )
    assert relative(logits(found), logits(expected)) < 0.01  # the one is rounded to bf16 after, the other before
    for file in (copied / "out").glob("*.safetensors"):
        assert not any("scale_inv" in key for key in load_file(file))


@stock_reads
def test_an_adapter_that_stock_peft_made(trained, tmp_path):
    folder, _ = trained()
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"]
    options = dict(target_parameters=targets, modules_to_save=["lm_head"], use_rslora=True)
    theirs = moved(peft.get_peft_model(model(), lora("embed_tokens", "q_proj", **options)))
    theirs.save_pretrained(tmp_path / "adapter")
    done = ktmoe.merge_adapter(folder / "base", tmp_path / "adapter", tmp_path / "out")
    assert done.counts == {"experts": 36, "attention": 3, "elsewhere": 5}  # three routers, embedding, head
    assert relative(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(theirs)) < 1e-5
    assert relative(logits(theirs), logits(PeftModel.from_pretrained(model(), tmp_path / "adapter"))) < 1e-6


@pytest.mark.skipif(LAYOUTS["Qwen3-MoE"].stacked, reason="transformers 5 stacks the experts")
@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_of_one_linear_layer_per_expert(family, tmp_path):
    """transformers 4: stock peft trains them; ktmoe merges them."""
    model(family).save_pretrained(tmp_path / "base", max_shard_size="100KB")
    theirs = moved(peft.get_peft_model(model(family), lora("q_proj", *LAYOUTS[family].projections.values())))
    theirs.save_pretrained(tmp_path / "adapter")
    ktmoe.merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", torch_dtype=torch.float32)
    assert relative(logits(merged), logits(theirs)) < 1e-5


def test_one_tensor_in_memory_at_a_time(trained, tmp_path, monkeypatch):
    """Merged pieces are made when they are written, and let go before the next one is made."""
    folder, _ = trained()
    alive: list[weakref.ref] = []
    make = changes.Source.output

    def output(self, key, change, kind, count):
        def watched(matrix, e):
            assert not any(ref() is not None for ref in alive)
            changed = change(matrix, e)
            alive[:] = [weakref.ref(changed)]
            return changed

        return make(self, key, watched if change else None, kind, count)

    monkeypatch.setattr(changes.Source, "output", output)
    assert ktmoe.merge_adapter(folder / "base", folder / "adapter", tmp_path / "out").counts["experts"] == 36
    assert alive


REFUSED = [
    (lambda f: (f / "out").mkdir() or (f / "out" / "model.safetensors").touch(), "out is there already and not empty"),
    (lambda f: (f / "out").touch(), "out is there already"),
    (lambda f: (f / "out.part").mkdir(), r"out\.part is there, perhaps of a merge that was killed"),
    (lambda f: (f / "base" / "config.json").unlink(), r"no config\.json"),
    (lambda f: shutil.rmtree(f / "adapter"), "no adapter that peft can read"),
    (lambda f: next((f / "base").glob("*2-of*.safetensors")).unlink(), "shards are missing"),
]


def nothing_left(folder, before):
    assert {p.relative_to(folder) for p in folder.rglob("*")} == before


@pytest.mark.parametrize(("damage", "message"), REFUSED)
def test_refusals_before_anything_is_written(damage, message, copied):
    damage(copied)
    before = {p.relative_to(copied) for p in copied.rglob("*")}
    with pytest.raises(KTError, match=message):
        ktmoe.merge_adapter(copied / "base", copied / "adapter", copied / "out")
    nothing_left(copied, before)


ATTENTION = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{ATTENTION}.lora_A.weight": torch.zeros(4, 32)}, r"q_proj.lora_A.weight is \(4, 32\).* 64 for 32"),
        ({f"{ATTENTION}.lora_magnitude_vector": torch.zeros(64)}, "more than plain LoRA.*merge_and_unload"),
        ({f"{ATTENTION}.lora_B.bias": torch.zeros(64)}, "more than plain LoRA"),
        ({f"{ATTENTION.replace('.0.', '.9.')}.lora_A.weight": torch.zeros(4, 64)}, "layers.9.*does not fit the model"),
        (
            {"base_model.model.model.layers.1.mlp.experts.9.up_proj.lora_A.weight": torch.zeros(4, 64)},
            "1 not expected",
        ),
        ({"base_model.model.score.weight": torch.zeros(2, 64)}, "no parameter of that name"),
        ({f"{ATTENTION}.lora_B.weight": torch.full((64, 4), float("nan"))}, "q_proj.weight: merging gives NaN"),
    ],
)
def test_adapters_that_do_not_fit(change, message, copied):
    path = copied / "adapter" / "adapter_model.safetensors"
    save_file(load_file(path) | change, path, metadata={"format": "pt"})
    before = {p.relative_to(copied) for p in copied.rglob("*")}
    with pytest.raises(KTError, match=message):
        ktmoe.merge_adapter(copied / "base", copied / "adapter", copied / "out")
    nothing_left(copied, before)


def test_an_adapter_of_another_family(trained, tmp_path):
    with pytest.raises(KTError, match="does not fit"):
        ktmoe.merge_adapter(
            trained("Qwen3-MoE")[0] / "base", trained("DeepSeek-V2-Lite")[0] / "adapter", tmp_path / "out"
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dict(quantization_config={"quant_method": "gptq"}), "quantised .gptq.*Take the unquantised checkpoint"),
        (dict(tie_word_embeddings=True), "shares between input and output"),
    ],
)
def test_bases_that_cannot_be_merged_into(config, message, copied):
    path = copied / "base" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    made = moved(attach(model(), REFERENCE, lora=lora("experts", "embed_tokens")))
    made.save_pretrained(copied / "adapter")
    with pytest.raises(KTError, match=message):
        ktmoe.merge_adapter(copied / "base", copied / "adapter", copied / "out")


def test_a_full_disk(trained, tmp_path, monkeypatch):
    folder, _ = trained()
    with monkeypatch.context() as m:
        m.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
        with pytest.raises(KTError, match="0 GB free; the checkpoint takes"):
            ktmoe.merge_adapter(folder / "base", folder / "adapter", tmp_path / "out")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing, "_write", full)
    with pytest.raises(KTError, match=r"No space left on device.*Nothing was left behind"):
        ktmoe.merge_adapter(folder / "base", folder / "adapter", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_command(trained, tmp_path):
    folder, adapted = trained()
    (tmp_path / "out").mkdir()  # empty: that is fine
    arguments = ["merge", str(folder / "base"), str(folder / "adapter"), str(tmp_path / "out")]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    assert "48 matrices merged: " in result.output
    assert "36 in experts" in result.output
    assert "12 in attention" in result.output
    assert relative(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), adapted) < 1e-5
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 2
    assert "not empty" in result.output
