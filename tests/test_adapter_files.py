"""Adapters on disk: stock peft reads ours, we read stock peft's, and what does not fit is refused whole."""

import dataclasses
import json
import warnings

import families
import peft
import pytest
import torch
import transformers
from helpers import call, relative, weights
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_models import FAMILIES, REFERENCE, logits, lora, model, moved
from transformers import AutoModelForCausalLM, HunYuanMoEV1Config

import ktmoe
from ktmoe import KTError, MoEExperts
from ktmoe.adapters import fused as fused_lora
from ktmoe.adapters import model as adapters
from ktmoe.adapters import peft_model, writing
from ktmoe.adapters.layout import FUSED, checkpoint_layout
from ktmoe.adapters.targets import routers
from ktmoe.models import attach
from ktmoe.types import LORA_NAMES, MoEShape


LAYOUTS = {
    family: checkpoint_layout(getattr(transformers, families.FAMILIES[family].config).model_type)
    for family in FAMILIES
    if hasattr(transformers, families.FAMILIES[family].config)
}
UNREADABLE = LAYOUTS["Qwen3-MoE"].unreadable
stock_reads = pytest.mark.skipif(bool(UNREADABLE), reason=UNREADABLE)
EXPERTS = "base_model.model.model.layers.1.mlp.experts"
FUSED_TARGETS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def saved(folder):
    tensors = load_file(folder / "adapter_model.safetensors")
    return tensors, json.loads((folder / "adapter_config.json").read_text())


def rewrite(folder, tensors):
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def test_a_module_that_is_no_transformers_model(tmp_path):
    """Whatever peft and transformers are installed: made, trained, disabled, merged, saved, loaded."""
    module = torch.nn.Module()
    module.q = torch.nn.Linear(64, 64)
    module.experts = MoEExperts(weights(), top_k=2, config=REFERENCE)
    module.forward = lambda x, *routing: module.experts(module.q(x), *routing)
    args = call(module.experts)
    base = module(*args).detach()
    made = moved(adapters.get_peft_model(module, lora("q", "experts", task_type=None)))
    made(*args).sum().backward()
    assert all(p.grad is not None for p in made.parameters() if p.requires_grad)
    expected = made(*args).detach()
    made.save_pretrained(tmp_path)
    with made.disable_adapter():
        assert torch.equal(made(*args), base)
    made.merge_adapter()
    assert relative(made(*args).detach(), expected) < 0.01  # bf16 weights
    made.unmerge_adapter()
    assert relative(made(*args).detach(), expected) < 1e-6
    made.add_adapter("other", lora("experts", r=2, task_type=None))
    made.set_adapter("other")
    made.set_adapter("default")
    made.delete_adapter("other")
    again = ktmoe.load_adapter(made.unload(), tmp_path)
    assert relative(again(*args).detach(), expected) < 1e-6
    bare = again.merge_and_unload()
    assert bare is module
    assert relative(bare(*args).detach(), expected) < 0.01


@stock_reads
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "options",
    [
        dict(target_modules=["q_proj", "experts"], lora_alpha=12),
        dict(target_modules="all-linear", use_rslora=True, lora_dropout=0.1),
    ],
    ids=["experts", "all-linear"],
)
def test_stock_peft_reads_every_family(family, options, tmp_path):
    trained = moved(attach(model(family), REFERENCE, lora=lora(**options)))
    trained.save_pretrained(tmp_path)
    stock = PeftModel.from_pretrained(model(family), tmp_path)
    assert relative(logits(stock), logits(trained)) < 1e-6


def test_what_is_on_disk(tmp_path):
    attach(model(), REFERENCE, lora=lora("q_proj", "experts", lora_alpha=12)).save_pretrained(tmp_path / "P")
    tensors, config = saved(tmp_path / "P")
    assert tensors[f"{EXPERTS}.3.gate_proj.lora_A.weight"].shape == (4, 64)
    assert tensors[f"{EXPERTS}.3.down_proj.lora_B.weight"].shape == (64, 4)
    assert len(tensors) == 3 * (4 * 6 + 2)
    assert config["target_modules"] == ["down_proj", "gate_proj", "q_proj", "up_proj"]
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (4, 12, {})
    attach(model("Mixtral"), REFERENCE, lora=lora("experts")).save_pretrained(tmp_path / "W")
    tensors, config = saved(tmp_path / "W")
    assert config["target_modules"] == ["w1", "w2", "w3"]
    assert "base_model.model.model.layers.2.block_sparse_moe.experts.3.w3.lora_B.weight" in tensors


@pytest.mark.skipif(LAYOUTS["Qwen2-MoE"].adapter_format != FUSED, reason="peft maps this family here")
def test_the_format_of_families_that_peft_does_not_map(tmp_path):
    trained = moved(attach(model("Qwen2-MoE"), REFERENCE, lora=lora("q_proj", "experts", lora_alpha=12)))
    trained.save_pretrained(tmp_path)
    tensors, config = saved(tmp_path)
    sizes = {k.removeprefix(f"{EXPERTS}."): tuple(t.shape) for k, t in tensors.items() if k.startswith(EXPERTS)}
    assert sizes == {
        "base_layer.lora_A.weight": (4 * 8, 64),
        "base_layer.lora_B.weight": (2 * families.I, 4 * 8),
        "lora_A.weight": (4 * 4, families.I),
        "lora_B.weight": (64, 4 * 4),
    }
    assert config["target_modules"] == ["q_proj"]
    assert config["target_parameters"] == ["experts.down_proj", "experts.gate_up_proj"]
    assert config["rank_pattern"] == {r"experts\.gate_up_proj": 8}
    assert config["alpha_pattern"] == {r"experts\.gate_up_proj": 24}


def test_fusing_is_exact_and_comes_apart_again():
    shape = MoEShape(num_experts=3, hidden_size=8, intermediate_size=6, top_k=2, rank=2)
    tensors = {n: torch.randn(s) for n, s in shape.lora_shapes().items()}
    packed = fused_lora.fuse(tensors)
    parts = {p: fused_lora.Fused(*fused_lora.unpack(a, b, 3, False), 0.5) for p, (a, b) in packed.items()}
    for e in range(3):
        delta = parts["gate_up_proj"].lora_B[e] @ parts["gate_up_proj"].lora_A[e]
        for rows, name in ((delta[:6], "gate_proj"), (delta[6:], "up_proj")):
            torch.testing.assert_close(rows, tensors[f"{name}.lora_B"][e] @ tensors[f"{name}.lora_A"][e])
    split = fused_lora.split(parts["gate_up_proj"], parts["down_proj"], shape)
    (again,) = fused_lora.unite({"x": (split, shape)}).values()
    assert (again.rank, again.scaling) == (2, 0.5)
    assert all(torch.equal(again.tensors[n], tensors[n]) for n in LORA_NAMES)


@stock_reads
@pytest.mark.parametrize(
    ("options", "rank"),
    [
        (dict(target_modules=["q_proj", "gate_proj", "up_proj", "down_proj"]), 8),  # renamed by peft: gate_up 2r
        (dict(target_modules=["q_proj"], target_parameters=FUSED_TARGETS), 4),
        (dict(target_modules=["q_proj"], target_parameters=FUSED_TARGETS, rank_pattern={r".*\.down_proj": 6}), 6),
        (dict(target_modules=["q_proj"], target_parameters=FUSED_TARGETS, alpha_pattern={"down_proj": 5}), 4),
        (dict(target_modules=["q_proj"], target_parameters=FUSED_TARGETS, use_rslora=True), 4),
        (dict(target_modules=[], target_parameters=FUSED_TARGETS[1:]), 4),
        (dict(target_modules=[], target_parameters=FUSED_TARGETS[:1]), 4),
        (dict(target_modules=["q_proj"], target_parameters=["layers.1." + t for t in FUSED_TARGETS]), 4),
        (dict(target_modules=["q_proj"], target_parameters=[*FUSED_TARGETS, "mlp.gate.weight"]), 4),
    ],
)
def test_adapters_that_stock_peft_fused_are_read(options, rank, tmp_path):
    stock = moved(peft.get_peft_model(model(), lora(**options)))
    stock.save_pretrained(tmp_path / "theirs")
    mine = ktmoe.load_adapter(attach(model(), REFERENCE), tmp_path / "theirs", is_trainable=True)
    assert relative(logits(mine), logits(stock)) < 1e-6
    assert set(mine.get_submodule(EXPERTS).r.values()) == {rank}
    if options["target_modules"]:
        assert mine.get_submodule(EXPERTS.replace("mlp.experts", "self_attn.q_proj")).r["default"] == 4
    mine.save_pretrained(tmp_path / "ours")
    again = PeftModel.from_pretrained(model(), tmp_path / "ours")
    assert relative(logits(again), logits(stock)) < 1e-6


def test_fused_adapters_of_older_peft_have_a_and_b_swapped(tmp_path):
    """As peft 0.17 and 0.18 write them on transformers 5: [E, out, in] was taken for [E, in, out]."""
    trained = moved(attach(model(), REFERENCE, lora=lora("experts")))
    trained.save_pretrained(tmp_path)
    _, config = saved(tmp_path)
    tensors = {}
    for n in range(3):
        layer = trained.get_submodule(EXPERTS.replace(".1.", f".{n}."))
        for parameter, (a, b) in fused_lora.fuse(layer.stacked("default")).items():
            (a, b) = fused_lora.unpack(a, b, 4, False)
            a, b = fused_lora.pack(b.mT, a.mT)
            inside = "base_layer." if parameter == "gate_up_proj" else ""
            prefix = f"{EXPERTS.replace('.1.', f'.{n}.')}.{inside}"
            tensors |= {f"{prefix}lora_A.weight": a.detach(), f"{prefix}lora_B.weight": b.detach()}
    assert tensors[f"{EXPERTS}.base_layer.lora_A.weight"].shape == (4 * 8, 128)
    rewrite(tmp_path, tensors)
    config |= dict(target_modules=[], target_parameters=FUSED_TARGETS)
    config |= dict(rank_pattern={".*gate_up_proj": 8}, alpha_pattern={".*gate_up_proj": 16})
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    again = ktmoe.load_adapter(attach(model(), REFERENCE), tmp_path)
    assert torch.equal(logits(again), logits(trained))


def test_training_goes_on_with_its_dropout(tmp_path):
    trained = moved(attach(model(), REFERENCE, lora=lora("q_proj", "experts", lora_dropout=0.25)))
    trained.save_pretrained(tmp_path)
    if LAYOUTS["Qwen3-MoE"].stacked:  # peft refuses dropout on stacked parameters
        assert saved(tmp_path)[1]["lora_dropout"] == 0
    again = ktmoe.load_adapter(attach(model(), REFERENCE), tmp_path, is_trainable=True)
    assert again.peft_config["default"].lora_dropout == 0.25
    assert again.get_submodule("base_model.model.model.layers.0.self_attn.q_proj").lora_dropout["default"].p == 0.25
    again.save_pretrained(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "lora_dropout": "0.25"}


def test_two_adapters_are_saved_each_for_itself(tmp_path):
    made = moved(attach(model(), REFERENCE, lora=lora("experts", "q_proj")))
    made.add_adapter("other", lora("experts", "o_proj", r=2))
    made.set_adapter("other")
    expected = logits(moved(made, seed=1))
    made.save_pretrained(tmp_path)
    assert saved(tmp_path / "other")[1]["r"] == 2
    again = ktmoe.load_adapter(attach(model(), REFERENCE), tmp_path)
    again.load_adapter(str(tmp_path / "other"), "second")
    again.set_adapter("second")
    assert torch.equal(logits(again), expected)
    again.set_adapter("default")
    made.set_adapter("default")
    assert torch.equal(logits(again), logits(made))


def test_what_was_written_is_read_back(tmp_path, monkeypatch):
    made = attach(model(), REFERENCE, lora=lora("experts", "q_proj"))
    made.save_pretrained(tmp_path / "good")
    lost = f"{EXPERTS}.2.up_proj.lora_A.weight"

    def forgetful(tensors, path, metadata):
        save_file({k: v for k, v in tensors.items() if k != lost}, path, metadata=metadata)

    monkeypatch.setattr(writing, "save_file", forgetful)
    with pytest.raises(KTError, match=rf"1 tensors are not as they were written, e.g. {lost}"):
        made.save_pretrained(tmp_path / "bad")
    monkeypatch.undo()
    monkeypatch.setattr(writing, "_per_expert", lambda experts, layout: {})
    with pytest.raises(KTError, match="the expert LoRA of 3 layers is not there"):
        made.save_pretrained(tmp_path / "bad")
    monkeypatch.undo()
    config = writing.saved_config
    monkeypatch.setattr(writing, "saved_config", lambda *args: config(*args) | {"lora_alpha": 1})
    with pytest.raises(KTError, match=r"expert LoRA is scaled by .*0\.25.*, not 2\.0"):
        made.save_pretrained(tmp_path / "bad")
    assert [p.name for p in tmp_path.iterdir()] == ["good"]


def test_a_pair_without_a_stock_reader_is_said_once(tmp_path, monkeypatch):
    layout = dataclasses.replace(LAYOUTS["Qwen3-MoE"], unreadable="nothing reads this. Use something else.")
    monkeypatch.setattr(peft_model, "layout_of", lambda model: layout)
    made = attach(model(), REFERENCE, lora=lora("experts"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.resetwarnings()
        warnings.simplefilter("default")  # as Python shows them: a text once
        for _ in range(2):
            made.save_pretrained(tmp_path)
    said = [str(w.message) for w in caught if str(w.message).startswith("ktmoe:")]
    assert said == ["ktmoe: nothing reads this. Use something else."]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t, c: t.update({k: torch.zeros(5, 64) for k in t if "q_proj.lora_A" in k}),
            r"q_proj.lora_B.weight is \(64, 4\), expected \(64, 5\)",
        ),
        (
            lambda t, c: t.update({"base_model.model.model.layers.7.q_proj.lora_A.weight": torch.zeros(4, 64)}),
            "7.q_pr",
        ),
        (lambda t, c: [t.pop(k) for k in list(t) if ".experts." not in k and "lora_B" in k], "Missing.*lora_B"),
        (lambda t, c: [t.pop(k) for k in list(t) if ".1.mlp.experts.3." in k], r"6 missing.*1\.mlp\.experts\.3"),
        (lambda t, c: c.update(r=5), r"wrong shape.*\(4, 64\), expected \(5, 64\)"),
        (lambda t, c: c.update(peft_type="IA3", feedforward_modules=[]), "IA3"),
        (lambda t, c: c.clear(), "LoRA adapters only"),
    ],
)
def test_bad_files_leave_the_model_as_it_was(change, message, tmp_path):
    moved(attach(model(), REFERENCE, lora=lora("experts", "q_proj"))).save_pretrained(tmp_path)
    tensors, config = saved(tmp_path)
    change(tensors, config)
    rewrite(tmp_path, tensors)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    target = attach(model(), REFERENCE)
    before, modules = logits(target), {n: type(m) for n, m in target.named_modules()}
    with pytest.raises(KTError, match=message):
        ktmoe.load_adapter(target, tmp_path)
    assert {n: type(m) for n, m in target.named_modules()} == modules
    assert torch.equal(logits(target), before)


def test_a_truncated_file_and_an_empty_folder(tmp_path):
    attach(model(), REFERENCE, lora=lora("experts")).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(KTError, match="no adapter that peft can read"):
            ktmoe.load_adapter(attach(model(), REFERENCE), folder)


def test_routers_are_left_out_by_all_linear_and_said_otherwise(recwarn):
    config = HunYuanMoEV1Config(
        vocab_size=128, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=32,
        intermediate_size=64, num_experts=4, moe_topk=2,
    )  # fmt: skip
    attached = attach(AutoModelForCausalLM.from_config(config, dtype=torch.float32), REFERENCE)
    assert routers(attached) == [f"model.layers.{n}.mlp.gate.wg" for n in range(2)]
    made = ktmoe.get_peft_model(attached, lora(target_modules="all-linear"))
    assert not any(".wg." in n for n, _ in made.named_parameters() if "lora_" in n)
    assert any("shared_mlp" in n for n, _ in made.named_parameters() if "lora_" in n)
    assert routers(made.get_base_model()) == routers(attached)
    assert not any("router" in str(w.message) for w in recwarn)
    bare = made.unload()
    for targets in (["wg", "experts"], r".*\.(wg|experts)"):
        with pytest.warns(UserWarning, match=r"reaches the router \(model.layers.0.mlp.gate.wg and 1 more\)"):
            bare = ktmoe.get_peft_model(bare, lora(target_modules=targets)).unload()


def test_a_second_adapter_on_all_linear_reaches_what_the_first_did():
    made = ktmoe.get_peft_model(attach(model("Qwen2-MoE"), REFERENCE), lora(target_modules="all-linear"))
    made.add_adapter("other", lora(target_modules="all-linear"))
    names = [n for n, _ in made.named_parameters() if ".default" in n]
    assert [n for n, _ in made.named_parameters() if ".other" in n]
    assert {n.replace(".default", ".other") for n in names} == {n for n, _ in made.named_parameters() if ".other" in n}


def test_counts_include_the_frozen_experts():
    stock = model()
    total = sum(p.numel() for p in stock.parameters())
    made = attach(stock, REFERENCE, lora=lora("experts"))
    in_lora = sum(p.numel() for p in made.parameters() if p.requires_grad)
    assert in_lora == 3 * 4 * 3 * 4 * (64 + 64)
    assert made.get_nb_trainable_parameters() == (in_lora, total + in_lora)
