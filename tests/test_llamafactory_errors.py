"""What `ktmoe train` refuses: every case in one process, with LLaMA-Factory's loading functions made to raise."""

import dataclasses
import importlib.util
import json
import os
import sys

import families
import pytest
import yaml
from peft import LoraConfig, PrefixTuningConfig
from transformers import LlamaConfig, Qwen3MoeConfig, TrainingArguments
from typer.testing import CliRunner

from ktmoe.backends import kt
from ktmoe.cli import app
from ktmoe.llamafactory import keys, shipped
from ktmoe.types import KTError


pytestmark = pytest.mark.skipif(importlib.util.find_spec("llamafactory") is None, reason="LLaMA-Factory not installed")

SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
MOE = {"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2}

STORED = {
    "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "int4": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True},
            }
        },
    },
}

INFERENCE = ("model_name_or_path", "use_kt", "kt_backend", "finetuning_type")


class Loaded(Exception):
    """Something was loaded: all checks had been passed."""


@pytest.fixture(scope="module")
def llamafactory():
    from ktmoe.llamafactory import install

    install()
    install()  # a second time changes nothing


@pytest.fixture
def model(tmp_path):
    Qwen3MoeConfig(**SIZES, **MOE).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def train(llamafactory, model, tmp_path, monkeypatch):
    """Runs `ktmoe train` with a configuration that fits, apart from the keys given."""
    from llamafactory.chat import hf_engine
    from llamafactory.train import dpo, sft

    from ktmoe.llamafactory import main

    def loading(*args, **kwargs):
        raise Loaded

    for module in (sft.workflow, dpo.workflow, hf_engine):
        for name in ("load_tokenizer", "get_dataset", "load_model"):
            monkeypatch.setattr(module, name, loading, raising=module is not hf_engine)
    monkeypatch.setattr(sys, "argv", sys.argv)  # main changes these
    for name, value in (("USE_KT", "0"), ("NPROC_PER_NODE", "1"), ("PATH", os.environ["PATH"])):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LLAMAFACTORY_VERBOSITY", "WARNING")

    (tmp_path / "dataset_info.json").write_text(json.dumps({"toy": {"file_name": "toy.json"}}))

    def run(*argv, command="train", **given):
        config = {
            "model_name_or_path": str(model),
            "stage": "sft",
            "do_train": True,
            "finetuning_type": "lora",
            "lora_rank": 8,
            "dataset": "toy",
            "dataset_dir": str(tmp_path),
            "output_dir": str(tmp_path / "out"),
            "use_cpu": True,
            "bf16": True,
            "report_to": "none",
            "use_kt": True,
            "kt_backend": "reference",
            **given,
        }
        path = tmp_path / "config.yaml"
        if command != "train":
            config = {k: v for k, v in config.items() if k in INFERENCE or k in given}
        path.write_text(yaml.safe_dump(config))
        main([str(path), *argv], command)

    return run


def refused(train, *argv, **given):
    """The message of what `train` refuses; loading something instead fails the test."""
    with pytest.raises(KTError) as error:
        train(*argv, **given)
    return str(error.value)


def test_what_fits_goes_on_to_loading(train):
    """Else every other test here could pass for nothing."""
    with pytest.raises(Loaded):
        train()


@pytest.mark.parametrize("allow_extra", ["0", "1"])
@pytest.mark.parametrize("use_kt", [True, False])
@pytest.mark.parametrize(
    ("key", "says"),
    [("cpu_infer", "kt_num_threads"), ("kt_optimize_rule", "without rules"), ("kt_use_lora_experts", "lora_target")],
)
def test_old_keys(train, monkeypatch, key, says, use_kt, allow_extra):
    monkeypatch.setenv("ALLOW_EXTRA_ARGS", allow_extra)
    message = refused(train, use_kt=use_kt, **{key: 4})
    assert key in message
    assert says in message


def test_old_key_that_llamafactory_has_may_be_null(train):
    with pytest.raises(Loaded):
        train(kt_expert_checkpoint_path=None)


@pytest.mark.parametrize("allow_extra", ["0", "1"])
def test_misspelt_key_does_not_vanish(train, monkeypatch, allow_extra):
    monkeypatch.setenv("ALLOW_EXTRA_ARGS", allow_extra)
    assert "kt_num_thread: no such key. Did you mean kt_num_threads?" in refused(train, kt_num_thread=4)
    assert "use_ktransformers: no such key" in refused(train, use_ktransformers=True)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("kt_backend", "AMXBF", "Did you mean AMXBF16?"),
        ("kt_num_threads", "sixty", "expected a whole number"),
        ("kt_tp_enabled", "yes please", "expected true or false"),
        ("kt_num_gpu_experts", 2, "torch sees no GPU here"),
        ("kt_weight_path", "packed", "only AMXInt8"),
        ("use_kt", "true", "expected true or false"),
        ("lora_rank", 0, "expects a whole number of at least 1"),
        ("lora_rank", "8", "expects a whole number of at least 1"),
        ("lora_alpha", -1, "expects a number above 0"),
        ("finetuning_type", "full", "expects lora"),
        ("finetuning_type", "freeze", "expects lora"),
        ("stage", "rm", "value head"),
        ("stage", "ppo", "value head"),
        ("ref_model_quantization_bit", 4, "kt_backend"),
        ("ref_model_adapters", "one,two", "expects one adapter"),
        ("infer_backend", "vllm", "by themselves"),
        ("use_dora", True, "plain LoRA only"),
        ("pissa_init", True, "plain LoRA only"),
        ("use_galore", True, "full weights"),
        ("use_apollo", True, "full weights"),
        ("use_badam", True, "full weights"),
        ("use_muon", True, "stacked"),
        ("optim", "lomo", "expects an optimizer"),
        ("quantization_bit", 3, "none, 4 or 8"),
        ("use_unsloth", True, "model class of its own"),
        ("mixture_of_depths", "convert", "model class of its own"),
        ("enable_liger_kernel", True, "replaces the experts"),
        ("use_llama_pro", True, "not built yet"),
        ("use_asft_loss", True, "second model"),
        ("train_from_scratch", True, "trained weights"),
        ("fp16", True, "bf16: true"),
        ("deepspeed", "no_such_file.json", "not built yet"),
        ("fsdp", "full_shard", "not built yet"),
        ("predict_with_generate", True, "not built yet"),
        ("compute_accuracy", True, "not built yet"),
        ("adapter_name_or_path", "one,two", "expects one adapter"),
        ("create_new_adapter", True, "would ignore it"),
    ],
)
def test_values(train, key, value, says):
    message = refused(train, **{key: value})
    assert message.startswith(f"{key}: got ")
    assert says in message
    assert "\n" not in message


def test_rules_name_keys_of_llamafactory(llamafactory):
    """A key that LLaMA-Factory renames would never be refused again."""
    from llamafactory.hparams.parser import _TRAIN_ARGS

    from ktmoe.llamafactory.rules import _RULES

    # `use_mca` is no key: LLaMA-Factory sets it while parsing.
    assert set(_RULES) - {f.name for cls in _TRAIN_ARGS for f in dataclasses.fields(cls)} <= {"use_mca"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("USE_RAY", "1"),
        ("USE_MCA", "1"),
        ("USE_V1", "true"),
        ("ACCELERATE_USE_FSDP", "true"),
        ("ACCELERATE_USE_DEEPSPEED", "true"),
    ],
)
def test_environment(train, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    assert refused(train).startswith(f"{name}: got {value}; ")


def test_a_dense_model(train, tmp_path):
    LlamaConfig(**SIZES).save_pretrained(tmp_path / "dense")
    assert "has no MoE layer" in refused(train, model_name_or_path=str(tmp_path / "dense"))


def test_a_quantised_model(train, model):
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq"}
    (model / "config.json").write_text(json.dumps(config))
    assert "quantised (gptq); expected bf16" in refused(train)
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(Loaded):  # dequantised while streaming
        train()


@pytest.mark.parametrize("stored", STORED)
def test_the_checkpoint_s_own_format_is_known_before_loading(train, model, tmp_path, stored):
    """To `train`, `check` and `plan` alike: which kernel takes it, which does not, and what it needs of the sizes."""
    from ktmoe.llamafactory import check, plan

    own, other = (("AMXFP8", "AMXInt4"), ("AMXInt4", "AMXFP8"))[stored == "int4"]
    sizes = {**SIZES, **MOE, "hidden_size": 1024, "moe_intermediate_size": 1024, "num_experts": 8}
    Qwen3MoeConfig(**sizes, quantization_config=STORED[stored]).save_pretrained(model)
    with pytest.raises(Loaded):
        train(kt_backend="auto")
    config = str(tmp_path / "config.yaml")
    assert plan([config]).stored == stored
    if kt.available():
        assert f"{own} or AMXBF16 or torch, whichever is measured to be faster" in check([config])
        assert f"Routed experts: {own}." in check([config, f"kt_backend={own}"])
    for command in (check, plan):
        with pytest.raises(KTError, match=f"kt_backend: {other} takes experts that the checkpoint holds in"):
            command([config, f"kt_backend={other}"])
    assert f"kt_backend: {other} takes experts" in refused(train, kt_backend=other)
    Qwen3MoeConfig(**sizes).save_pretrained(model)
    assert f"kt_backend: {own} takes experts" in refused(train, kt_backend=own)


def test_sizes_that_the_kernel_cannot_take(train, model):
    Qwen3MoeConfig(**{**SIZES, **MOE, "moe_intermediate_size": 48}).save_pretrained(model)
    message = refused(train, kt_backend="AMXBF16")
    assert "48" in message
    assert "32" in message
    with pytest.raises(Loaded):
        train(kt_backend="torch")


def test_no_such_model_and_adapter(train, tmp_path):
    assert refused(train, model_name_or_path=str(tmp_path)).startswith("model_name_or_path: got ")
    assert refused(train, adapter_name_or_path=str(tmp_path)).startswith("adapter_name_or_path: got ")


@pytest.mark.parametrize(("stage", "more"), [("dpo", {}), ("dpo", {"pref_loss": "orpo"}), ("sft", {})])
def test_stages_that_are_built(train, stage, more):
    with pytest.raises(Loaded):
        train(stage=stage, **more)


@pytest.mark.parametrize("loss", ["hinge", "ipo", "kto_pair"])
def test_preference_losses_that_would_be_another(train, loss, monkeypatch):
    from llamafactory.train.dpo import trainer

    message = refused(train, stage="dpo", pref_loss=loss)
    assert message.startswith(f"pref_loss: got '{loss}'")
    assert "would compute the sigmoid loss" in message
    monkeypatch.setattr(trainer.DPOTrainer, "dpo_loss", lambda self, a, b, c, d: None)  # an older trl
    with pytest.raises(Loaded):
        train(stage="dpo", pref_loss=loss)


def test_reference_models(train, model, tmp_path):
    assert "given without ref_model" in refused(train, stage="dpo", ref_model_adapters=str(tmp_path))
    assert refused(train, stage="dpo", ref_model=str(tmp_path)).startswith("ref_model: model_name_or_path: got ")
    LlamaConfig(**SIZES).save_pretrained(tmp_path / "dense")
    assert "has no MoE layer" in refused(train, stage="dpo", ref_model=str(tmp_path / "dense"))
    message = refused(train, stage="dpo", ref_model=str(model), ref_model_adapters=str(tmp_path))
    assert message.startswith("ref_model: adapter_name_or_path: got ")
    with pytest.raises(Loaded):
        train(stage="dpo", ref_model=str(model))


@pytest.mark.parametrize("optim", ["paged_adamw_8bit", "adamw_torch_8bit", "adamw_8bit", "schedule_free_adamw"])
def test_optimizers_whose_package_is_missing(train, optim):
    if any(importlib.util.find_spec(name) for name in ("bitsandbytes", "torchao", "schedulefree")):
        pytest.skip("a package that this is about is installed")
    message = refused(train, optim=optim)
    assert message.startswith(f"optim: got '{optim}'; ")
    assert "install" in message


def test_checkpoints_that_are_not_whole(train, tmp_path):
    """`kill -9` leaves one: by its name it would be the newest."""
    from ktmoe.llamafactory.checkpoints import last_complete

    out = tmp_path / "out"
    for step, state in ((2, '{"global_step": 2}'), (10, '{"global_step": 10}'), (20, '{"global'), (30, None)):
        (out / f"checkpoint-{step}").mkdir(parents=True)
        if state:
            (out / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert last_complete(str(out)) == (str(out / "checkpoint-10"), ["checkpoint-30", "checkpoint-20"])
    for broken in ("checkpoint-20", "checkpoint-30"):
        message = refused(train, resume_from_checkpoint=str(out / broken))
        assert "was not written to its end" in message
        assert message.endswith(f"The newest complete one is {out / 'checkpoint-10'}.")
    assert "is no folder" in refused(train, resume_from_checkpoint=str(out / "gone"))
    assert "no complete checkpoint" in refused(train, resume_from_checkpoint=True, output_dir=str(tmp_path / "empty"))
    for fits in (None, True, str(out / "checkpoint-2")):
        with pytest.raises(Loaded):
            train(resume_from_checkpoint=fits)


def test_kt_config(train, llamafactory, monkeypatch):
    """The mapping of LLaMA-Factory's development head."""
    assert "kt_num_threads: got 'x'" in refused(train, kt_config={"kt_num_threads": "x"})
    assert refused(train, kt_config={"kt_thread": 1}).startswith(
        "kt_config: kt_thread: no such key. Did you mean kt_num"
    )
    assert "given beside it too" in refused(train, kt_config={"kt_backend": "torch"})
    assert "expected a mapping" in refused(train, kt_config="torch")
    flat = keys.flat(
        {"use_kt": True, "kt_config": {"kt_backend": "torch", "kt_num_threads": 2, "kt_tp_enabled": False}}
    )
    assert flat == {"use_kt": True, "kt_backend": "torch", "kt_num_threads": 2, "kt_tp_enabled": False}
    assert keys.flat({"kt_config": None}) == {}
    from llamafactory.train import tuner

    seen = []
    monkeypatch.setattr(tuner, "run_sft", lambda model_args, *args: seen.append(model_args.kt_num_threads))
    train(kt_config={"kt_num_threads": 3})
    assert seen == [3]
    with pytest.raises(KTError, match="fits a file"):
        keys.flat(["--kt_config", "{}"])


def test_rank_is_that_of_the_adapter_to_go_on_with(llamafactory, tmp_path):
    from llamafactory.hparams import FinetuningArguments, ModelArguments

    from ktmoe.llamafactory.preflight import largest_rank

    LoraConfig(r=16).save_pretrained(tmp_path)
    given = FinetuningArguments(lora_rank=4)
    assert largest_rank(ModelArguments(model_name_or_path="x"), given) == 4
    adapter = ModelArguments(model_name_or_path="x", adapter_name_or_path=str(tmp_path))
    assert largest_rank(adapter, given) == 16
    PrefixTuningConfig().save_pretrained(tmp_path)
    with pytest.raises(KTError, match=r"adapter_name_or_path: .* expected LORA"):
        largest_rank(adapter, given)


def test_llamafactorys_own_entry_point_checks_too(llamafactory, monkeypatch):
    """For callers that install ktmoe and go on with `run_exp`, and for torchrun's workers."""
    from llamafactory.train.tuner import run_exp

    monkeypatch.setenv("ALLOW_EXTRA_ARGS", "1")
    with pytest.raises(KTError, match="cpu_infer: write kt_num_threads"):
        run_exp({"model_name_or_path": "x", "output_dir": "y", "cpu_infer": 4})
    with pytest.raises(KTError, match="stage: got 'rm'"):
        run_exp({"model_name_or_path": "x", "output_dir": "y", "use_kt": True, "stage": "rm"})


def test_targets(train):
    assert refused(train, lora_target="q_proj,gate_proj").startswith("lora_target: got [gate_proj, q_proj]; LoRA on t")
    assert refused(train, lora_target="c_attn").startswith("lora_target: got [c_attn]; Qwen3MoeForCausalLM has no suc")
    assert refused(train, lora_target="c_attn").endswith("all is a good start.")
    assert refused(train, lora_target="q_proj,experts.0").startswith("lora_target: got [experts.0, q_proj]; LoRA on t")
    assert "peft has no LoRA for Qwen3MoeRMSNorm" in refused(train, lora_target="q_proj,input_layernorm")
    assert refused(train, lora_target="q_proj,gate", lora_dropout=0.1).startswith("lora_dropout: got 0.1; model.layer")
    assert refused(train, lora_target="q_proj,experts", use_dora=True).startswith("use_dora: got True; the routed exp")
    with pytest.raises(Loaded):
        train(lora_target="q_proj,v_proj", use_dora=True)
    for target in ("experts", "mlp", "layers.0"):
        assert refused(train, additional_target=target).startswith(f"additional_target: got '{target}', which means ")
    for fits in ("experts", "q_proj,experts", "gate_proj,up_proj,down_proj", "q_proj,v_proj", "q_proj,gate", "all"):
        with pytest.raises(Loaded):
            train(lora_target=fits, additional_target="lm_head,mlp.gate")


def test_trust_remote_code_takes_the_native_class(train, model):
    """The files that auto_map names do not exist."""
    config = json.loads((model / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "gone.Config", "AutoModelForCausalLM": "gone.Model"}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(Loaded):
        train(trust_remote_code=True)


def test_errors_of_llamafactory_itself_are_the_users(train):
    assert "['nonsense']" in refused(train, nonsense=1)
    assert "specify dataset" in refused(train, dataset=None)
    assert "Invalid fine-tuning" in refused(train, use_kt=False, finetuning_type="lroa")


def test_several_gpus_stay_one_process(train, llamafactory, monkeypatch):
    """Neither torchrun nor nn.DataParallel, and no device map."""
    from llamafactory.train import tuner

    seen = {}

    def run_sft(model_args, data_args, training_args, *args):
        seen.update(device_map=model_args.device_map, n_gpu=training_args.n_gpu)
        raise Loaded

    monkeypatch.setattr(tuner, "run_sft", run_sft)
    monkeypatch.setattr(TrainingArguments, "_setup_devices", _TwoDevices(TrainingArguments._setup_devices.func))
    with pytest.raises(Loaded):
        train()
    assert seen == {"device_map": None, "n_gpu": 1}
    assert os.environ["USE_KT"] == "1"


class _TwoDevices:
    """`TrainingArguments._setup_devices`, a cached property, as it is on a machine with two GPUs."""

    def __init__(self, stock):
        self.stock = stock

    def __get__(self, args, owner):
        args.__dict__["_setup_devices"] = device = self.stock(args)
        args._n_gpu = 2
        return device


def test_chat_and_export(train, model):
    with pytest.raises(Loaded):
        train(command="chat", template="default")
    assert "infer_backend: got 'vllm'" in refused(train, command="chat", infer_backend="vllm")
    assert "stage: got 'rm'" in refused(train, command="chat", stage="rm")
    assert "quantization_bit: got 3" in refused(train, command="chat", quantization_bit=3)
    one = model.parent / "one"
    LoraConfig(r=2).save_pretrained(one)
    merge = dict(command="export", export_dir=str(model.parent / "merged"), adapter_name_or_path=str(one))
    for key, value in (
        ("export_size", 2), ("quantization_bit", 4), ("export_hub_model_id", "me/it"), ("resize_vocab", True),
        ("infer_dtype", "float16"), ("export_legacy_format", True),
    ):  # fmt: skip
        assert refused(train, **merge | {key: value}).startswith(f"{key}: got {value!r}; with use_kt, ")
    assert "export_dir: not given" in refused(train, **merge | {"export_dir": None})
    assert "nothing to merge" in refused(train, **merge | {"adapter_name_or_path": None})
    done = CliRunner().invoke(app, ["eval", "x.yaml"])
    assert done.exit_code == 2
    assert "do_eval: true" in done.stderr


EVALUATED = {"val_size": 0.1, "eval_strategy": "steps", "eval_steps": 10}
LOGGERS = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "wandb": ("wandb",),
    "mlflow": ("mlflow",),
    "dvclive": ("dvclive",),
}


@pytest.mark.parametrize("logger", LOGGERS)
def test_loggers_that_are_not_installed(train, logger):
    if any(importlib.util.find_spec(name) for name in LOGGERS[logger]):
        pytest.skip("installed")
    message = refused(train, report_to=logger)
    assert message.startswith(f"report_to: got ['{logger}']; ")
    assert message.endswith("or write report_to: none.")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"report_to": "nonsense"}, "nonsense"),
        ({"early_stopping_steps": 2}, "metric_for_best_model"),
        ({"early_stopping_steps": 2, "metric_for_best_model": "loss"}, "eval_strategy: steps with eval_dataset"),
        ({"load_best_model_at_end": True}, "eval"),
        ({"eval_strategy": "steps"}, "eval_dataset"),
        ({"metric_for_best_model": "bleu", **EVALUATED}, "eval_bleu"),
        ({"save_strategy": "best", **EVALUATED}, "metric_for_best_model"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "lr_scheduler_kwargs"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "lr_scheduler_kwargs"),
        ({"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": 1.0}}, "lr_scheduler_type: got"),
        ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"nonsense": 1}}, "nonsense"),
        ({"lr_scheduler_type": "cosin"}, "cosin"),
        ({"optim": "adamw"}, "adamw"),
        ({"optim": "adamw_torch", "learning_rate": -1.0}, "learning rate"),
        ({"use_liger_kernel": True}, "use_liger_kernel: got true"),
        ({"push_to_hub": True}, "push_to_hub: got true"),
        ({"use_unsloth_gc": True}, "use_unsloth_gc: got true"),
        ({"per_device_train_batch_size": 0}, "batch_size"),
        ({"gradient_accumulation_steps": 0}, "zero"),
        ({"dataloader_prefetch_factor": 2}, "prefetch"),
        ({"cutoff_len": 0}, "cutoff_len: got 0"),
        (
            {"template": "qwen4_nothing"},
            "template: got 'qwen4_nothing'; expected one of LLaMA-Factory's, such as",
        ),
        ({"dataset": "tony"}, "There are: toy."),
        ({"dataset": "toy,tony"}, "There are: toy."),
        ({"eval_dataset": "tony"}, "There are: toy."),
        ({"dataset_dir": "nowhere"}, "dataset_dir names the folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_what_the_trainer_would_refuse_after_loading(train, given, says, tmp_path):
    message = refused(train, **given)
    assert says in message
    assert "Traceback" not in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "given",
    [
        {"early_stopping_steps": 2, "load_best_model_at_end": True, "save_steps": 10, **EVALUATED},
        {"metric_for_best_model": "eval_loss", "save_strategy": "best", **EVALUATED},
        {
            "eval_dataset": "toy",
            "eval_on_each_dataset": True,
            "metric_for_best_model": "eval_toy_loss",
            "eval_strategy": "steps",
        },
        {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 3}, "max_steps": 10},
        {"lr_scheduler_type": "reduce_lr_on_plateau", **EVALUATED},
        {"dataloader_num_workers": 2, "dataloader_prefetch_factor": 2, "dataloader_persistent_workers": True},
        {"neftune_noise_alpha": 5, "label_smoothing_factor": 0.1, "max_grad_norm": 0.5, "weight_decay": 0.1},
        {"per_device_train_batch_size": 64, "gradient_accumulation_steps": 64, "dataloader_drop_last": True},
        {"use_unsloth_gc": True, "disable_gradient_checkpointing": True},
        {"loraplus_lr_ratio": 16, "optim": "adafactor", "warmup_ratio": 0.1},
        {"auto_find_batch_size": True, "torch_compile": False, "full_determinism": False},
        {"stage": "dpo", "metric_for_best_model": "eval_rewards/accuracies", **EVALUATED},
        {"do_train": False, "do_eval": True, "val_size": 0.1},
    ],
    ids=lambda given: " ".join(given),
)
def test_what_the_trainer_takes_goes_on_to_loading(train, given, tmp_path):
    with pytest.raises(Loaded):
        train(**given)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("folder", ["file/inside", "/proc/nobody/out", "x" * 300])
def test_output_folders_that_cannot_be_made(train, tmp_path, folder):
    (tmp_path / "file").write_text("")
    message = refused(train, output_dir=str(tmp_path / folder))
    assert message.startswith("output_dir: got ")


def test_the_rehearsal_leaves_the_random_numbers_alone(train, monkeypatch):
    """Else datasets would be sampled and split otherwise than by LLaMA-Factory itself."""
    import torch
    import transformers
    from llamafactory.train import sft

    drawn = []

    def load(*args, **kwargs):
        drawn.extend(torch.rand(3).tolist())
        raise Loaded

    monkeypatch.setattr(sft.workflow, "load_tokenizer", load)
    with pytest.raises(Loaded):
        train(seed=7)
    transformers.set_seed(7)
    assert drawn == torch.rand(3).tolist()


@pytest.mark.parametrize(("stage", "name"), [("sft", "identity"), ("dpo", "dpo_en_demo")])
def test_data_that_come_with_ktmoe(train, tmp_path, monkeypatch, stage, name):
    """LLaMA-Factory's default folder is one of its repository."""
    from llamafactory.data import loader
    from llamafactory.train import tuner

    monkeypatch.chdir(tmp_path)
    read = []

    def run_stage(model_args, data_args, training_args, *args):
        rows = loader._get_merged_dataset(
            data_args.dataset, model_args, data_args, training_args, "rm" if stage == "dpo" else stage
        )
        read.append(len(rows))
        raise Loaded

    monkeypatch.setattr(tuner, f"run_{stage}", run_stage)
    with pytest.raises(Loaded):
        train(dataset=name, dataset_dir="data", stage=stage)
    assert read[0] > 10
    assert "come with ktmoe" in refused(train, dataset="mine", dataset_dir="data")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps({"mine": {"file_name": "mine.json"}}))
    assert "There are: mine." in refused(train, dataset=name, dataset_dir="data")  # a folder of the user's own wins


@pytest.mark.parametrize("name", [n for n in shipped.examples() if not n.endswith(".py")])
def test_examples_run_in_an_empty_folder(train, tmp_path, monkeypatch, capsys, name):
    """As the README has the command, for who has the package alone; each with a small model of its family."""
    from ktmoe.llamafactory import check, main

    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    family = families.of_example(name)
    families.config(family).save_pretrained(tmp_path / "of family")
    argv = [
        f"examples/{name}.yaml",
        f"model_name_or_path={tmp_path / 'of family'}",
        "use_cpu=true",
        "kt_backend=torch",
    ]
    assert "nothing was found that would be refused before loading. Routed experts: torch." in check(argv)
    with pytest.raises(Loaded):
        main(argv)
    assert "the example that comes with ktmoe is used" in capsys.readouterr().err
    with pytest.raises(KTError, match="cannot be read"):
        main(["examples/none.yaml"])
    assert list((tmp_path / "empty").iterdir()) == []


@pytest.mark.parametrize(("given", "slow", "dtype"), [
    ({"bf16": False}, True, "float32"), ({"bf16": False}, False, "bfloat16"), ({"bf16": True}, True, "bfloat16"),
])  # fmt: skip
def test_without_bf16_everything_is_fp32_where_a_cpu_has_no_instructions_for_it(
    train, model, monkeypatch, given, slow, dtype
):
    """LLaMA-Factory alone would load the dtype that the checkpoint has."""
    from llamafactory.model import load_config
    from llamafactory.train import sft

    Qwen3MoeConfig(**SIZES, **MOE, dtype="bfloat16").save_pretrained(model)
    monkeypatch.setattr("ktmoe.llamafactory.loading.bf16_is_slow", lambda: slow)
    found = []

    def load(model_args):
        config = load_config(model_args)
        found.append(str(getattr(config, "dtype", None) or config.torch_dtype).removeprefix("torch."))
        raise Loaded

    monkeypatch.setattr(sft.workflow, "load_tokenizer", load)
    with pytest.raises(Loaded):
        train(**given)
    assert found == [dtype]


def test_check_refuses_what_train_refuses_and_loads_nothing(train, model, tmp_path):
    from ktmoe.llamafactory import check

    with pytest.raises(Loaded):
        train()
    config = str(tmp_path / "config.yaml")
    assert check([config]).endswith("refused before loading. Routed experts: reference.")
    assert not (tmp_path / "out").exists()
    for wrong, says in (
        ("kt_backend=AMXBF8", "AMXBF8"),
        ("report_to=nonsense", "nonsense"),
        ("dataset=tony", "There are: toy."),
        ("model_name_or_path=nowhere", "nowhere"),
        ("use_kt=false", "use_kt: is not true"),
        ("kt_nonsense=1", "kt_nonsense"),
    ):
        with pytest.raises(KTError, match=says):
            check([config, wrong])
    done = CliRunner().invoke(app, ["check", config, "kt_backend=AMXBF8"])
    assert done.exit_code == 2
    assert done.stderr.startswith("ktmoe: kt_backend: got 'AMXBF8'")


def test_examples_are_listed_and_written_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["examples"])
    assert done.stdout.split() == list(shipped.examples())
    assert CliRunner().invoke(app, ["examples", "mixtral_lora_sft_kt"]).exit_code == 0
    written = tmp_path / "mixtral_lora_sft_kt.yaml"
    assert yaml.safe_load(written.read_text())["use_kt"] is True
    written.write_text("mine")
    done = CliRunner().invoke(app, ["examples", "mixtral_lora_sft_kt.yaml"])
    assert done.exit_code == 2
    assert "is there already" in done.stderr
    assert written.read_text() == "mine"
    done = CliRunner().invoke(app, ["examples", "mixtral"])
    assert done.stderr.startswith("ktmoe: NAME: got 'mixtral'; expected one of mixtral_lora_sft_kt")


def test_scripts_are_examples_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["examples", "trl_sft"])
    assert done.stdout == "ktmoe: trl_sft.py is written. python runs it.\n"
    compile((tmp_path / "trl_sft.py").read_text(), "trl_sft.py", "exec")


def test_torchrun_is_this_pythons(train, monkeypatch, tmp_path):
    """Whatever `torchrun` comes first on PATH, and with spaces in paths."""
    import subprocess

    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "torchrun").write_text("#!/bin/sh\necho 'No module named torch' >&2; exit 1\n")
    (tmp_path / "bin" / "torchrun").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("FORCE_TORCHRUN", "1")
    started = []
    stock = subprocess.run

    def run(command, **kwargs):
        started.append(command)
        return stock([sys.executable, "-c", ""], **kwargs)

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(SystemExit):
        train("output_dir=a folder/of mine", "learning_rate=1e-4")
    ((python, flag, module, *options, worker, config, first, second),) = started
    assert (python, flag, module) == (sys.executable, "-m", "torch.distributed.run")
    assert "--nproc_per_node 1" in " ".join(options)
    assert os.path.basename(worker) == "worker.py"
    assert os.path.isfile(worker)
    assert config.endswith("config.yaml")
    assert (first, second) == ("output_dir=a folder/of mine", "learning_rate=1e-4")
