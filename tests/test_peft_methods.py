"""peft's own methods and functions on a model whose routed experts ktmoe runs: as stock peft, or one sentence."""

import copy
import inspect
import warnings

import peft
import pytest
import torch
from families import IDS
from helpers import relative
from peft import PeftModel
from peft.tuners.lora import LoraModel
from peft.utils import hotswap
from test_adapter_files import stock_reads
from test_models import REFERENCE, logits, lora, model, moved

import ktmoe
from ktmoe import KTError
from ktmoe.models import attach


def pair(tmp_path, **options):
    """The same two adapters, "default" and "other", on ktmoe's experts and on stock peft's."""
    ours = moved(attach(model(), REFERENCE, lora=lora("q_proj", "experts", **options)))
    ours.add_adapter("other", lora("q_proj", "experts", lora_alpha=4))
    ours.set_adapter("other")
    moved(ours, seed=1)
    ours.set_adapter("default")
    ours.save_pretrained(tmp_path)
    stock = PeftModel.from_pretrained(model(), tmp_path, is_trainable=True)
    stock.load_adapter(tmp_path / "other", "other")
    stock.set_adapter("default")
    return ours.eval(), stock.eval()


def layers(made, name="scale_layer"):
    return [m for m in made.modules() if hasattr(m, name)]


def disabled(made):
    with made.disable_adapter():
        return logits(made)


def in_turn(*calls):
    def run(made):
        for call in calls:
            made = call(made) or made
        return logits(made.eval())

    return run


# What is called; every entry leaves logits that stock peft's have to match.
LIKE_STOCK = {
    "PeftModel.forward": logits,
    "PeftModel.generate": lambda m: m.generate(input_ids=IDS[:1], max_new_tokens=4, do_sample=False).float(),
    "PeftModel.set_adapter": in_turn(lambda m: m.set_adapter("other")),
    "LoraModel.set_adapter": in_turn(lambda m: m.base_model.set_adapter(["default", "other"])),
    "PeftModel.delete_adapter": in_turn(lambda m: m.delete_adapter("default")),
    "LoraModel.delete_adapter": in_turn(lambda m: m.base_model.delete_adapter("other")),
    "PeftModel.disable_adapter": disabled,
    "LoraModel.disable_adapter_layers": in_turn(lambda m: m.base_model.disable_adapter_layers()),
    "LoraModel.enable_adapter_layers": in_turn(
        lambda m: m.base_model.disable_adapter_layers(), lambda m: m.base_model.enable_adapter_layers()
    ),
    "LoraModel.merge_adapter": in_turn(lambda m: m.merge_adapter()),
    "LoraModel.merge_adapter, names": in_turn(lambda m: m.merge_adapter(["default", "other"], True)),
    "LoraModel.unmerge_adapter": in_turn(lambda m: m.merge_adapter(), lambda m: m.unmerge_adapter()),
    "LoraModel.merge_and_unload": in_turn(lambda m: m.merge_and_unload()),
    "LoraModel.merge_and_unload, names": in_turn(lambda m: m.base_model.merge_and_unload(False, True, ["other"])),
    "LoraModel.unload": in_turn(lambda m: m.unload()),
    "PeftModel.get_base_model": in_turn(lambda m: m.get_base_model()),
    "PeftModel.add_adapter": in_turn(
        lambda m: m.add_adapter("third", lora("k_proj")), lambda m: m.set_adapter("third")
    ),
    "PeftModel.state_dict": in_turn(lambda m: m.load_state_dict(m.state_dict()) and None),
    "set_scale": in_turn(lambda m: [layer.set_scale("default", 3.0) for layer in layers(m)] and None),
    "scale_layer": in_turn(lambda m: [layer.scale_layer(0.5) for layer in layers(m)] and None),
    "unscale_layer": in_turn(
        lambda m: [layer.scale_layer(0.5) for layer in layers(m)] and None,
        lambda m: [layer.unscale_layer() for layer in layers(m)] and None,
    ),
    "PeftModel.train": lambda m: logits(m.train()),
    "PeftModel.to": in_turn(lambda m: m.to(torch.float32)),
    "copy.deepcopy": in_turn(copy.deepcopy),
    "peft.get_peft_model_state_dict": in_turn(
        lambda m: (
            peft.set_peft_model_state_dict(m, peft.get_peft_model_state_dict(m, adapter_name="other"), "default")
            and None
        )
    ),
}
if "inference_mode" in inspect.signature(PeftModel.set_adapter).parameters:
    LIKE_STOCK["PeftModel.set_adapter, inference_mode"] = in_turn(
        lambda m: m.set_adapter("other", inference_mode=True)
    )


@stock_reads
@pytest.mark.parametrize("name", LIKE_STOCK)
def test_works_as_in_stock_peft(name, tmp_path):
    ours, stock = pair(tmp_path)
    call = LIKE_STOCK[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got, expected = call(ours), call(stock)
    assert got.shape == expected.shape
    assert relative(got, expected) < 1e-5
    if "generate" not in name:
        assert flags(ours) == flags(stock)


def flags(made):
    """Which modules train, without regard to how the experts' LoRA is named."""
    return {
        n.split(".experts.")[0].replace(".base_layer", ""): p.requires_grad
        for n, p in made.named_parameters()
        if "lora_" in n or ".experts." not in n
    }


def test_every_row_of_a_batch_with_its_own_adapter(tmp_path):
    made = moved(attach(model(), REFERENCE, lora=lora("q_proj", "experts")))
    made.add_adapter("other", lora("experts", lora_alpha=4))
    made.set_adapter("other")
    moved(made, seed=1).eval()
    rows, names = IDS[:1].repeat(4, 1), ["other", "__base__", "default", "other"]
    got = made(rows, adapter_names=names).logits.detach()
    expected = {"__base__": disabled(made)[:1]}
    for name in ("default", "other"):
        made.set_adapter(name)
        expected[name] = logits(made)[:1]
    assert all(relative(g[None], expected[n]) < 1e-6 for g, n in zip(got, names, strict=True))
    options = dict(max_new_tokens=3, do_sample=False, num_beams=1 if peft.__version__ < "0.20" else 2)
    both = made.generate(input_ids=rows[:2], adapter_names=["default", "other"], **options)
    assert torch.equal(both[1:], made.generate(input_ids=rows[:1], **options))
    alone = attach(model(), REFERENCE, lora=lora("experts")).eval()
    with pytest.raises(KTError, match="3 names for 7 tokens"):
        alone(IDS[:1, :7], adapter_names=["default"] * 3)
    alone.merge_adapter()
    with pytest.raises(KTError, match="unmerge_adapter"):
        alone(IDS[:1], adapter_names=["default"])


@stock_reads
def test_what_the_model_says_of_itself(tmp_path):
    ours, stock = pair(tmp_path)
    assert ours.active_adapters == stock.active_adapters
    assert ours.active_peft_config.r == stock.active_peft_config.r
    assert ours.modules_to_save == stock.modules_to_save
    assert ours.has_active_enabled_adapter
    assert ours.base_model_torch_dtype == stock.base_model_torch_dtype
    for status in ("get_model_status",):
        mine, theirs = (getattr(m, status)() for m in (ours, stock))
        for field in ("enabled", "active_adapters", "merged_adapters", "requires_grad", "available_adapters"):
            assert getattr(mine, field) == getattr(theirs, field), field
    experts = [s for s in ours.get_layer_status() if s.name.endswith("mlp.experts")]
    assert [s.active_adapters for s in experts] == [["default"]] * 3
    without = [m.get_nb_trainable_parameters()[1] - sum(p.numel() for n, p in m.named_parameters() if "lora_" in n)
               for m in (ours, stock)]  # fmt: skip
    assert without[0] == without[1]
    ours.print_trainable_parameters()
    assert "ktmoe" not in repr(ours.base_model.model.model.layers[0].self_attn)


def test_a_scale_of_the_moment_is_not_saved(tmp_path):
    ours, _ = pair(tmp_path)
    for layer in layers(ours):
        layer.set_scale("default", 5.0)
    ours.save_pretrained(tmp_path / "scaled")
    again = ktmoe.load_adapter(attach(model(), REFERENCE), tmp_path / "scaled")
    assert {m.scaling["default"] for m in layers(again)} == {2.0}


REFUSED = {
    "LoraModel.add_weighted_adapter": (
        lambda m: m.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum", combination_type="cat"),
        r"add_weighted_adapter.*not built.*set_adapter",
    ),
    "LoraModel.add_weighted_adapter, inside": (
        lambda m: m.base_model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum"),
        "add_weighted_adapter",
    ),
    "PeftModel.add_adapter, there": (lambda m: m.add_adapter("other", lora("experts")), "'other' is there already"),
    "PeftModel.add_adapter, IA3": (
        lambda m: m.add_adapter("x", peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[])),
        "got IA3 for a model with LORA",
    ),
    "PeftModel.save_pretrained, names": (
        lambda m: m.save_pretrained("x", selected_adapters=["x"]),
        "got 'x'.*default",
    ),
    "LoraModel.merge_adapter, names": (lambda m: m.merge_adapter(["nobody"]), "nobody"),
    "PeftModel.save_pretrained, initial": (
        lambda m: m.save_pretrained("x", path_initial_model_for_weight_conversion="y"),
        "nothing to convert",
    ),
    "hotswap.prepare_model_for_compiled_hotswap": (
        lambda m: hotswap.prepare_model_for_compiled_hotswap(m, target_rank=8),
        r"hotswap.*model\.load_adapter",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_or_one_sentence_and_nothing_has_changed(name, tmp_path):
    made = moved(attach(model(), REFERENCE, lora=lora("q_proj", "experts")))
    made.add_adapter("other", lora("q_proj", "experts"))
    before, parameters = logits(made), {n: p.requires_grad for n, p in made.named_parameters()}
    call, message = REFUSED[name]
    with pytest.raises(KTError, match=message) as caught:
        call(made)
    assert "\n" not in str(caught.value)
    assert torch.equal(logits(made), before)
    assert {n: p.requires_grad for n, p in made.named_parameters()} == parameters


# Tried by other tests, or not of a model with LoRA.
ELSEWHERE = {
    "PeftModel.save_pretrained", "PeftModel.load_adapter", "PeftModel.from_pretrained", "PeftModel.set_requires_grad",
    "PeftModel.create_or_update_model_card", "PeftModel.push_to_hub", "PeftModel.get_layer_status",
    "PeftModel.get_model_status", "PeftModel.get_nb_trainable_parameters", "PeftModel.print_trainable_parameters",
    "PeftModel.prepare_inputs_for_generation", "PeftModel.prepare_model_for_gradient_checkpointing",
    "PeftModel.get_prompt", "PeftModel.get_prompt_embedding_to_save", "PeftModel.supports_lora_conversion",
    "LoraModel.forward", "LoraModel.get_model_config", "LoraModel.inject_adapter", "LoraModel.set_requires_grad",
    "LoraModel.subtract_mutated_init", "LoraModel.supports_lora_conversion", "LoraModel.set_auxiliary_adapters",
}  # fmt: skip


def test_no_public_method_is_forgotten():
    """A new release of peft brings new ones: each is to be tried."""

    def public(cls):
        own = [c for c in cls.__mro__ if c.__module__.startswith("peft.")]
        return {f"{cls.__name__}.{n}" for c in own for n, v in vars(c).items() if n[0] != "_" and callable(v)}

    methods = {m.replace("PeftModelForCausalLM", "PeftModel") for m in public(peft.PeftModelForCausalLM)}
    methods |= public(LoraModel) - {"LoraModel.tuner_layer_cls"}
    methods |= {m for m in ELSEWHERE if m == "PeftModel.push_to_hub"}
    tried = {n.partition(",")[0] for n in (*LIKE_STOCK, *REFUSED)} | ELSEWHERE
    assert methods - tried == set()


@pytest.mark.parametrize("second", [True, False])
@pytest.mark.parametrize("first", [True, False])
def test_two_adapters_train_as_was_asked(first, second, tmp_path):
    moved(attach(model(), REFERENCE, lora=lora("q_proj", "experts", modules_to_save=["lm_head"]))).save_pretrained(
        tmp_path
    )
    made = ktmoe.load_adapter(attach(model(), REFERENCE), tmp_path, is_trainable=first)
    made.load_adapter(tmp_path, "second", is_trainable=second)
    trained = {n: p.requires_grad for n, p in made.named_parameters()}
    assert {v for n, v in trained.items() if ".default" in n} == {first}
    assert {v for n, v in trained.items() if ".second" in n} == {second}
    assert not any(v for n, v in trained.items() if ".default" not in n and ".second" not in n)
    made.add_adapter("third", lora("experts"))
    assert {n: p.requires_grad for n, p in made.named_parameters() if n in trained} == trained
    made.set_requires_grad("second", not second)
    assert {p.requires_grad for n, p in made.named_parameters() if ".second" in n} == {not second}
