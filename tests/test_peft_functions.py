"""peft's and transformers' own functions on a model whose routed experts ktmoe runs: they work, or say the remedy."""

import copy
import io
import pickle

import peft
import pytest
import torch
from families import IDS
from helpers import relative
from peft import PeftModel
from peft.utils import hotswap
from safetensors.torch import load_file
from test_forked_adapters import forked
from test_models import REFERENCE, logits, lora, model, moved
from transformers import AutoModelForCausalLM

import ktmoe
from ktmoe import KTConfig, KTError
from ktmoe.adapters.layer import LoraExperts
from ktmoe.models import attach


PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
OTHERS = {
    "prompt tuning": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prefix tuning": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "IA3": peft.IA3Config(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], feedforward_modules=[]),
    "LoHa": peft.LoHaConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=4),
    "LoKr": peft.LoKrConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=4),
    "VeRA": peft.VeraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=4),
    "AdaLora": peft.AdaLoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_r=4, total_step=9),
    "OFT": peft.OFTConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], oft_block_size=4),
    "LN tuning": peft.LNTuningConfig(task_type="CAUSAL_LM", target_modules=["norm"]),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_methods_where_they_leave_the_experts_alone(name, tmp_path):
    made = moved(ktmoe.get_peft_model(attach(model(), REFERENCE), copy.deepcopy(OTHERS[name])))
    made.train()(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in made.parameters() if p.requires_grad)
    made.eval().save_pretrained(tmp_path)
    again = ktmoe.load_adapter(attach(model(), REFERENCE), tmp_path)
    assert torch.equal(logits(again), logits(made))
    stock = PeftModel.from_pretrained(model(), tmp_path)
    assert relative(logits(again), logits(stock)) < 1e-5


@pytest.mark.parametrize(
    "config",
    [
        peft.IA3Config(target_modules=["q_proj", *PROJECTIONS], feedforward_modules=["down_proj"]),
        peft.LoHaConfig(target_modules=["experts"]),
        peft.AdaLoraConfig(target_modules=r".*\.experts\.\d+\.up_proj", total_step=9),
        peft.VeraConfig(target_modules=["q_proj"], modules_to_save=["mlp"]),
    ],
)
def test_and_one_sentence_where_they_do_not(config):
    base = attach(model(), REFERENCE)
    before = {n: type(m) for n, m in base.named_modules()}
    with pytest.raises(KTError, match=r"got \w+, whose target_modules or modules_to_save reach the routed experts"):
        ktmoe.get_peft_model(base, config)
    assert {n: type(m) for n, m in base.named_modules()} == before


@pytest.mark.parametrize(
    "config",
    [
        lora("q_proj", "experts"),
        lora(target_modules=r".*\.experts\.\d+\.gate_proj"),
        lora("q_proj", modules_to_save=["mlp"]),
        lora("q_proj", target_parameters=["experts.gate_up_proj"]),
    ],
)
def test_stock_functions_that_name_experts_say_so_before_anything(config):
    base = attach(model(), REFERENCE)
    before, modules = logits(base), {n: type(m) for n, m in base.named_modules()}
    for call in (
        lambda: peft.get_peft_model(base, config),
        lambda: peft.inject_adapter_in_model(config, base),
        lambda: base.add_adapter(config),
    ):
        with pytest.raises(KTError, match=r"ktmoe\.get_peft_model"):
            call()
        assert {n: type(m) for n, m in base.named_modules()} == modules
    assert torch.equal(logits(base), before)
    stock = peft.get_peft_model(model(), lora("q_proj"))  # a model without ktmoe is none of its business
    assert not isinstance(stock, type(ktmoe.get_peft_model(base, lora("experts"))))


def loaders():
    yield "PeftModel.from_pretrained", lambda base, path: PeftModel.from_pretrained(base, path)
    yield "model.load_adapter", lambda base, path: base.load_adapter(str(path))
    yield (
        "model.load_adapter, tensors",
        lambda base, path: base.load_adapter(
            adapter_state_dict=load_file(path / "adapter_model.safetensors"),
            peft_config=peft.PeftConfig.from_pretrained(path),
        ),
    )


@pytest.mark.parametrize(("name", "load"), list(loaders()), ids=[n for n, _ in loaders()])
@pytest.mark.parametrize("family", ["Qwen3-MoE", "Qwen2-MoE", "Mixtral"])
def test_stock_loading_says_that_it_would_leave_experts_out(family, name, load, tmp_path):
    trained = moved(attach(model(family), REFERENCE, lora=lora("q_proj", "experts")))
    trained.save_pretrained(tmp_path)
    base = attach(model(family), REFERENCE)
    before, modules = logits(base), {n: type(m) for n, m in base.named_modules()}
    with pytest.raises(KTError, match=r"ktmoe\.load_adapter"):
        load(base, tmp_path)
    assert torch.equal(logits(base), before)
    assert {n: type(m) for n, m in base.named_modules()} == modules
    assert torch.equal(logits(ktmoe.load_adapter(base, tmp_path)), logits(trained))  # the remedy


def test_a_second_adapter_by_stock_functions_leaves_the_first(tmp_path):
    moved(attach(model(), REFERENCE, lora=lora("k_proj", "experts"))).save_pretrained(tmp_path)
    stock = moved(peft.get_peft_model(attach(model(), REFERENCE), lora("q_proj")))
    before = logits(stock)
    with pytest.raises(KTError, match=r"ktmoe\.load_adapter"):
        stock.load_adapter(tmp_path, "second")
    assert list(stock.peft_config) == ["default"]
    assert torch.equal(logits(stock), before)
    both = ktmoe.load_adapter(stock, tmp_path, "second")
    both.base_model.set_adapter(["default", "second"])
    assert any(m.active_adapters == ["default", "second"] for m in both.modules() if isinstance(m, LoraExperts))
    assert not torch.equal(logits(both), before)
    both.save_pretrained(tmp_path / "both")
    again = ktmoe.load_adapter(attach(model(), REFERENCE), tmp_path / "both" / "second")
    both.set_adapter("second")
    assert torch.equal(logits(again), logits(both))


def test_a_model_with_adapters_is_not_given_others_over_them(tmp_path):
    made = moved(attach(model(), REFERENCE, lora=lora("q_proj", "experts")))
    made.save_pretrained(tmp_path)
    before = logits(made)
    for base in (made, made.get_base_model()):
        with pytest.raises(KTError, match=r"has adapters already.*unload"):
            ktmoe.get_peft_model(base, lora("experts"))
    with pytest.raises(KTError, match=r"has adapters already.*unload"):
        ktmoe.load_adapter(made.get_base_model(), tmp_path)
    assert torch.equal(logits(made), before)


@pytest.mark.parametrize(
    "config",
    [lora("nothing"), peft.IA3Config(), peft.AdaptionPromptConfig(adapter_len=2, adapter_layers=1), {"r": 4}],
)
def test_what_peft_refuses_is_one_error(config):
    base = attach(model(), REFERENCE)
    before = {n: type(m) for n, m in base.named_modules()}
    with pytest.raises(KTError, match=r"peft_config: |target_modules: "):
        ktmoe.get_peft_model(base, config)
    assert {n: type(m) for n, m in base.named_modules()} == before


@pytest.mark.parametrize(("name", "load"), list(loaders())[:2], ids=[n for n, _ in loaders()][:2])
def test_and_that_it_would_leave_out_the_forked_stack_s(name, load, tmp_path):
    trained, _ = forked(tmp_path)
    base = attach(model(), REFERENCE)
    before, modules = logits(base), {n: type(m) for n, m in base.named_modules()}
    with pytest.raises(KTError, match=r"LoRA on routed experts.*ktmoe\.load_adapter"):
        load(base, tmp_path)
    assert torch.equal(logits(base), before)
    assert {n: type(m) for n, m in base.named_modules()} == modules
    assert torch.equal(logits(ktmoe.load_adapter(base, tmp_path)), logits(trained))


@pytest.mark.parametrize(("name", "load"), list(loaders())[:2], ids=[n for n, _ in loaders()][:2])
def test_stock_loading_of_attention_alone_works(name, load, tmp_path):
    trained = moved(ktmoe.get_peft_model(attach(model(), REFERENCE), lora("q_proj")))
    trained.save_pretrained(tmp_path)
    base = attach(model(), REFERENCE)
    assert torch.equal(logits(load(base, tmp_path) or base), logits(trained))


def test_tensors_set_by_hand_are_taken_or_refused(tmp_path):
    trained = moved(attach(model(), REFERENCE, lora=lora("q_proj", "experts")))
    trained.save_pretrained(tmp_path)
    before = logits(trained)
    with pytest.raises(KTError, match=r"\d+ tensors of LoRA on routed experts would be left out"):
        peft.set_peft_model_state_dict(trained, load_file(tmp_path / "adapter_model.safetensors"))
    assert torch.equal(logits(trained), before)


def test_hot_swapping_says_what_does_it(tmp_path):
    made = moved(attach(model(), REFERENCE, lora=lora("q_proj", "experts")))
    made.save_pretrained(tmp_path)
    moved(made, seed=1)
    before = logits(made)
    with pytest.raises(KTError, match=r"hotswap.*model\.load_adapter"):
        hotswap.hotswap_adapter(made, str(tmp_path), "default")
    assert torch.equal(logits(made), before)
    made.load_adapter(tmp_path, "default")  # the remedy
    assert not torch.equal(logits(made), before)


def test_lora_fa_is_refused_and_lora_plus_trains():
    from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer

    made = attach(model(), REFERENCE, lora=lora("q_proj", "experts"))
    before = {n: p.requires_grad for n, p in made.named_parameters()}
    with pytest.raises(KTError, match=r"create_lorafa_optimizer.*LoRA\+"):
        create_lorafa_optimizer(made, r=4, lora_alpha=8, lr=1e-3)
    assert {n: p.requires_grad for n, p in made.named_parameters()} == before
    optimizer = create_loraplus_optimizer(made, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=8)
    made.train()(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    alone = ktmoe.get_peft_model(attach(model(), REFERENCE), lora("q_proj"))
    create_lorafa_optimizer(alone, r=4, lora_alpha=8, lr=1e-3)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("way", ["pickle", "torch.save"])
def test_pickled_and_back(backend, way, tmp_path):
    made = moved(attach(model(), KTConfig(kt_backend=backend), lora=lora("q_proj", "experts")))
    expected = logits(made)
    if way == "pickle":
        again = pickle.loads(pickle.dumps(made))
    else:
        buffer = io.BytesIO()
        torch.save(made, buffer)
        again = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    assert torch.equal(logits(again), expected)
    again.save_pretrained(tmp_path)
    assert torch.equal(logits(ktmoe.load_adapter(attach(model(), KTConfig(kt_backend=backend)), tmp_path)), expected)
    assert isinstance(again, type(made))
    bare = again.unload()
    with pytest.raises(KTError, match="checkpoint without experts"):
        bare.save_pretrained(tmp_path)


def test_merging_a_new_adapter_copies_no_experts(tmp_path):
    """TRL merges the adapter of a model that it is given with a peft_config, before it asks peft for another."""
    model().save_pretrained(tmp_path)
    made = ktmoe.load_model(tmp_path, REFERENCE, lora=lora("q_proj", "experts"))
    weights = [m.get_base_layer().weights for m in made.modules() if isinstance(m, LoraExperts)]
    bare = made.merge_and_unload()
    assert [m.weights for m in bare.modules() if type(m).__name__ == "MoEExperts"] == weights
    with pytest.raises(KTError, match="TRL"):
        peft.get_peft_model(bare, lora("experts"))
    assert isinstance(bare, AutoModelForCausalLM.from_pretrained(tmp_path).__class__)
