"""Our functions of peft's names take peft's arguments, in peft's order, with peft's defaults: on whatever release."""

import inspect

import peft
import pytest
from peft import PeftModel
from peft.tuners.lora import LoraModel
from test_models import REFERENCE, lora, model

import ktmoe
from ktmoe import KTError
from ktmoe.adapters.peft_model import _KTLoraMixin, _KTPeftMixin
from ktmoe.models import attach


# Ours may have these on releases that do not have them yet: new ones are put at the end by peft.
LATER = {"add_adapter": {"autocast_adapter_dtype"}}
PAIRS = [
    (ktmoe.get_peft_model, peft.get_peft_model),
    (ktmoe.load_adapter, PeftModel.from_pretrained),
    *((vars(_KTPeftMixin)[n], getattr(PeftModel, n)) for n in vars(_KTPeftMixin) if not n.startswith("_")),
    *((vars(_KTLoraMixin)[n], getattr(LoraModel, n)) for n in vars(_KTLoraMixin) if not n.startswith("_")),
]


@pytest.mark.parametrize(("ours", "theirs"), PAIRS, ids=[o.__qualname__.rpartition(".")[2] for o, _ in PAIRS])
def test_the_same_arguments(ours, theirs):
    def arguments(function):
        found = [p for p in inspect.signature(function).parameters.values() if p.name not in ("self", "cls")]
        return [(p.name, p.kind, p.default) for p in found]

    later = LATER.get(ours.__name__, set()) - {p for p, _, _ in arguments(theirs)}
    assert [a for a in arguments(ours) if a[0] not in later] == arguments(theirs)
    assert all(a[0] in later for a in arguments(ours)[len(arguments(theirs)) :])


def test_names_and_flags_by_position(tmp_path):
    attach(model(), REFERENCE, lora=lora("experts")).save_pretrained(tmp_path)
    made = ktmoe.load_adapter(attach(model(), REFERENCE), tmp_path, "sft")
    assert list(made.peft_config) == ["sft"]
    assert not any(p.requires_grad for p in made.parameters())
    made = ktmoe.load_adapter(attach(model(), REFERENCE), tmp_path, "sft", True)
    assert any(p.requires_grad for p in made.parameters())
    made.load_adapter(tmp_path, "more", True)
    assert {n.split(".")[-2] for n, p in made.named_parameters() if p.requires_grad} == {"sft", "more"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(is_trainble=True), "is_trainble=True, which it does not know"),
        (dict(path="x"), "path='x'"),
        (dict(ignore_mismatched_sizes=True), "ignore_mismatched_sizes"),
        (dict(low_cpu_mem_usage=True), "low_cpu_mem_usage"),
        (dict(key_mapping={"a": "b"}), "key_mapping"),
        (dict(config={}), "config: got dict"),
        (dict(adapter_name=True), "in this order"),
    ],
)
def test_unknown_and_refused_arguments_are_named(options, message, tmp_path):
    made = attach(model(), REFERENCE, lora=lora("experts"))
    made.save_pretrained(tmp_path)
    with pytest.raises(KTError, match=message):
        ktmoe.load_adapter(attach(model(), REFERENCE), tmp_path, **options)
    if not {"config", "adapter_name"} & set(options):
        with pytest.raises(KTError, match=message):
            made.load_adapter(tmp_path, "other", **options)


def test_what_concerns_others_is_passed_on(tmp_path):
    attach(model(), REFERENCE, lora=lora("experts")).save_pretrained(tmp_path / "inside")
    options = dict(subfolder="inside", revision=None, token=None, cache_dir=None, offload_folder="offload")
    made = ktmoe.load_adapter(attach(model(), REFERENCE), tmp_path, torch_device="cpu", **options)
    assert list(made.peft_config) == ["default"]
    made = ktmoe.get_peft_model(attach(model(), REFERENCE), lora("experts"), "a", False, True, "main")
    assert made.peft_config["a"].revision == "main"


def test_a_configuration_of_the_caller_s(tmp_path):
    attach(model(), REFERENCE, lora=lora("experts")).save_pretrained(tmp_path)
    config = peft.PeftConfig.from_pretrained(tmp_path)
    config.lora_alpha = 2 * config.lora_alpha
    made = ktmoe.load_adapter(attach(model(), REFERENCE), tmp_path, config=config)
    scaling = [m.scaling["default"] for m in made.modules() if type(m).__name__ == "LoraExperts"]
    assert scaling == [4.0] * 3


def test_a_model_that_has_adapters_gets_another(tmp_path):
    made = attach(model(), REFERENCE, lora=lora("experts"))
    made.save_pretrained(tmp_path)
    assert ktmoe.load_adapter(made, tmp_path, "second") is made
    assert list(made.peft_config) == ["default", "second"]
    assert made.active_adapters == ["default"]
    with pytest.raises(KTError, match=r"has an adapter 'default' already.*model\.load_adapter"):
        ktmoe.load_adapter(made, tmp_path)
