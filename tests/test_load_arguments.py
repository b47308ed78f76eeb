"""`load_model` takes what `AutoModelForCausalLM.from_pretrained` takes."""

import pytest
import torch
import transformers
from families import logits, model
from test_models import REFERENCE
from transformers import AutoConfig, AutoModelForCausalLM

import ktmoe
from ktmoe import KTConfig, KTError


V4 = transformers.__version__.startswith("4.")
DTYPE = "dtype" if tuple(int(n) for n in transformers.__version__.split(".")[:2]) >= (4, 56) else "torch_dtype"
ROPE = {"rope_theta": 500.0} if V4 else {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("model")
    model().save_pretrained(made, max_shard_size="100KB")
    return made


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_cache": False},
        {"output_router_logits": True, "router_aux_loss_coef": 0.5},
        {"attention_dropout": 0.25},
        ROPE,
        {"num_experts_per_tok": 1},
        {"num_hidden_layers": 1},
        {"attn_implementation": "eager"},
        {DTYPE: torch.bfloat16},
        {DTYPE: "bfloat16"},
        {DTYPE: "auto"},
        {"torch_dtype": torch.float32},
        {"device_map": "cpu", "use_cache": False},
        {"revision": "main", "local_files_only": True, "token": False, "force_download": False, "subfolder": ""},
        {"low_cpu_mem_usage": True, "use_safetensors": True, "variant": None},
    ],
    ids=str,
)
def test_as_from_pretrained(options, folder):
    theirs = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    ours = ktmoe.load_model(folder, REFERENCE, r=4, **options)
    for made in (theirs, ours):
        made.config.name_or_path = ""
    assert ours.config.to_dict() == theirs.config.to_dict()
    assert ours.dtype == theirs.dtype
    assert ours.generation_config.to_dict() == theirs.generation_config.to_dict()
    torch.testing.assert_close(
        logits(ours), logits(theirs), rtol=1e-2, atol=1e-3 if ours.dtype == torch.float32 else 0.05
    )


def test_a_configuration_of_transformers(folder):
    config = AutoConfig.from_pretrained(folder, use_cache=False, num_experts_per_tok=1)
    before = config.to_dict()
    theirs = AutoModelForCausalLM.from_pretrained(folder, config=config)
    for ours in (
        ktmoe.load_model(folder, config=config, kt_config=REFERENCE, r=4),
        ktmoe.load_model(folder, config, kt_config=REFERENCE, r=4),
    ):
        assert ours.config.use_cache is False
        torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-5)
    assert config.to_dict() == before


def test_configurations_that_are_none(folder):
    with pytest.raises(KTError, match="both of ktmoe"):
        ktmoe.load_model(folder, REFERENCE, kt_config=REFERENCE)
    with pytest.raises(KTError, match=r"config: got \{'kt_backend'.*expected ktmoe\.KTConfig.*or a configuration of"):
        ktmoe.load_model(folder, {"kt_backend": "torch"})
    with pytest.raises(KTError, match=r"kt_config: got 'torch'; expected ktmoe\.KTConfig"):
        ktmoe.load_model(folder, kt_config="torch")


def test_an_argument_that_does_not_exist(folder, monkeypatch):
    """transformers' own words, before a weight is read; a configuration that is given takes no values either."""
    config = AutoConfig.from_pretrained(folder)
    monkeypatch.setattr(transformers.PreTrainedModel, "_load_pretrained_model", None)
    for options in ({"no_such_thing": 1}, {"config": config, "use_cache": False}):
        with pytest.raises(TypeError, match="unexpected keyword argument"):
            AutoModelForCausalLM.from_pretrained(folder, **options)
        for kind in (TypeError, KTError):
            with pytest.raises(kind, match=r"unexpected keyword argument '(no_such_thing|use_cache)'"):
                ktmoe.load_model(folder, kt_config=REFERENCE, r=4, **options)
    with pytest.raises(KTError, match=r"'kt_backend'\. kt_backend belongs into ktmoe\.KTConfig\(kt_backend=\.\.\.\)"):
        ktmoe.load_model(folder, r=4, kt_backend="torch")


@pytest.mark.parametrize("name", ["state_dict", "gguf_file", "key_mapping", "tp_plan", "load_in_4bit"])
def test_arguments_without_a_meaning_here(name, folder):
    with pytest.raises(KTError, match=rf"load_model: got {name}; with ktmoe, .*\. Leave it out"):
        ktmoe.load_model(folder, REFERENCE, **{name: "something"})


def test_the_account_of_loading(folder):
    ours, info = ktmoe.load_model(folder, KTConfig(kt_backend="reference"), r=4, output_loading_info=True)
    assert not info["missing_keys"]
    assert logits(ours).isfinite().all()
