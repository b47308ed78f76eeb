"""Everything but the routed experts in 4 bits, by bitsandbytes: loaded, computed and trained as stock peft does it."""

import pytest
import torch
import transformers
from families import model
from helpers import BF16_KERNELS, relative, train_on
from peft import LoraConfig
from test_stored_experts import IDS, config, logits
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import ktmoe
from ktmoe import KTError
from ktmoe.verify.stored_model import store_experts


bitsandbytes = pytest.importorskip("bitsandbytes")
FOUR = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
SIZES = {  # that bitsandbytes multiplies on a CPU
    "hidden_size": 128,
    "moe_intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 8,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for name in ("bf16", "fp8", "int4"):
        model("Qwen3-MoE", torch.bfloat16, **SIZES).save_pretrained(root / name)
        if name != "bf16":
            store_experts(root / name, name)
    return root


@pytest.mark.parametrize("backend", ["reference", "torch", *BF16_KERNELS])
def test_it_computes_what_stock_transformers_does_in_4_bits(folders, backend):
    """Its routed experts are stacked parameters, which bitsandbytes leaves alone."""
    stock = AutoModelForCausalLM.from_pretrained(folders / "bf16", quantization_config=FOUR, dtype=torch.bfloat16)
    tuned = ktmoe.load_model(folders / "bf16", config(backend), r=4, quantization_config=FOUR, dtype=torch.bfloat16)
    kinds = {name: type(m) for name, m in tuned.named_modules() if isinstance(m, nn.Linear)}
    assert {kinds.pop("lm_head"), *kinds.values()} == {nn.Linear, bitsandbytes.nn.Linear4bit}
    assert {tuned.model.layers[1].mlp.gate.weight.dtype, tuned.model.embed_tokens.weight.dtype} == {torch.bfloat16}
    assert relative(logits(tuned), logits(stock)) < (0.06 if backend == "AMXInt8" else 0.02)


def test_in_8_bits(folders):
    eight = BitsAndBytesConfig(load_in_8bit=True)
    stock = AutoModelForCausalLM.from_pretrained(folders / "bf16", quantization_config=eight, dtype=torch.bfloat16)
    tuned = ktmoe.load_model(folders / "bf16", config("torch"), r=4, quantization_config=eight, dtype=torch.bfloat16)
    assert type(tuned.model.layers[0].self_attn.q_proj) is bitsandbytes.nn.Linear8bitLt
    assert relative(logits(tuned), logits(stock)) < 0.02


def test_routers_that_are_linear_layers_are_spared(tmp_path):
    """Qwen2's gate of its shared expert; in transformers 4 every router."""
    sizes = {**SIZES, "shared_expert_intermediate_size": 128}
    del sizes["head_dim"]
    model("Qwen2-MoE", torch.bfloat16, **sizes).save_pretrained(tmp_path)
    tuned = ktmoe.load_model(tmp_path, config("reference"), r=4, quantization_config=FOUR, dtype=torch.bfloat16)
    block = tuned.model.layers[1].mlp
    assert type(block.shared_expert.up_proj) is bitsandbytes.nn.Linear4bit
    assert {type(block.shared_expert_gate), type(tuned.lm_head)} == {nn.Linear}
    assert logits(tuned).isfinite().all()


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("name", ["bf16", "int4"])
def test_lora_on_both_is_trained_saved_and_loaded(folders, name, use_reentrant, tmp_path):
    def load(**options):
        how = dict(quantization_config=FOUR, dtype=torch.bfloat16)
        return ktmoe.load_model(folders / name, config("reference"), **how, **options)

    torch.manual_seed(0)
    tuned = load(lora=LORA)
    tuned.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    tuned.enable_input_require_grads()
    losses = train_on(tuned.train(), IDS, 20, lr=1e-2)
    moved = {n for n, p in tuned.named_parameters() if "lora_B" in n and p.any()}  # they began at zero
    assert losses[-1] < 0.9 * losses[0]
    assert any("o_proj.lora_B" in n for n in moved)
    assert any(".experts." in n for n in moved)
    expected = logits(tuned.eval())
    tuned.save_pretrained(tmp_path)
    again = ktmoe.load_adapter(load(r=4), tmp_path)
    assert relative(logits(again), expected) < 1e-3


def test_what_it_cannot_be_is_refused(folders, monkeypatch):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)  # nothing is loaded
    given = transformers.GPTQConfig(bits=4)
    with pytest.raises(KTError, match=r"got GPTQConfig; expected transformers\.BitsAndBytesConfig"):
        ktmoe.load_model(folders / "bf16", config("torch"), quantization_config=given)
    with monkeypatch.context() as patch:
        patch.setattr("ktmoe.models.rest_in_bits.find_spec", lambda name: None)
        with pytest.raises(KTError, match="bitsandbytes is not installed: pip install bitsandbytes"):
            ktmoe.load_model(folders / "bf16", config("torch"), quantization_config=FOUR)


def test_an_fp8_model_whose_rest_is_fp8_too(folders, tmp_path):
    """As DeepSeek-V3 is released."""
    from safetensors.torch import load_file, save_file

    file = folders / "fp8" / "model.safetensors"
    tensors = load_file(file)
    key = "model.layers.0.self_attn.o_proj.weight"
    out = len(tensors[key])
    tensors |= {key: tensors[key].to(torch.float8_e4m3fn), f"{key}_scale_inv": torch.ones(-(-out // 128), 1)}
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(KTError, match=rf"{key} is quantised in the checkpoint already"):
        ktmoe.load_model(folders / "fp8", config("torch"), quantization_config=FOUR)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    factory = pytest.importorskip("factory")
    pytest.importorskip("llamafactory")
    return factory.Workspace(tmp_path_factory.mktemp("four"))


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_through_llama_factory(workspace, stage):
    """Beside stock LLaMA-Factory in 4 bits, which trains LoRA on the rest alone; ours on the experts too."""
    keys = {"stage": stage, "quantization_bit": 4, "lora_target": "q_proj,o_proj"}
    mine = workspace.run(f"mine {stage}", **keys, kt_backend="reference")
    stock = workspace.stock({stage: {}}, **keys)[stage]
    assert mine.keys() == stock.keys()
    near = 0.02 if stage == "sft" else 0.1  # of log-probabilities beside a reference's: bf16's noise shows more
    assert max(abs(mine[step] - stock[step]) for step in stock) < near * stock[1]
    whole = workspace.run(f"whole {stage}", stage=stage, quantization_bit=4, kt_backend="torch")
    assert whole[6] < whole[1]


def test_a_run_in_4_bits_goes_on_where_it_was(workspace):
    keys = {"quantization_bit": 4, "kt_backend": "reference"}
    whole = workspace.run("resumed", **keys)
    path = workspace.root / "resumed" / "checkpoint-3"
    assert workspace.run("resumed", **keys, resume_from_checkpoint=str(path)) == whole


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"quantization_bit": 3}, "quantization_bit: got 3; use_kt: true expects none, 4 or 8"),
        ({"quantization_bit": 4, "quantization_method": "hqq"}, "quantization_method: got 'hqq'.*expects bnb"),
    ],
)
def test_other_quantisers_are_refused(workspace, given, said):
    with pytest.raises(KTError, match=said):
        workspace.run("refused", **given)


def test_llama_factory_without_bitsandbytes(workspace, monkeypatch):
    monkeypatch.setattr("ktmoe.models.rest_in_bits.find_spec", lambda name: None)
    with pytest.raises(KTError, match="quantization_bit: bitsandbytes is not installed"):
        workspace.run("refused", quantization_bit=4)


def test_chat_in_4_bits(workspace):
    workspace.run("talks", quantization_bit=4)
    training = ("do_train", "dataset", "dataset_dir", "output_dir", "max_steps", "learning_rate", "logging_steps")
    training += ("save_steps", "per_device_train_batch_size", "use_cpu", "bf16", "report_to", "cutoff_len", "stage")
    keys = dict.fromkeys((*training, "lora_rank", "lora_target")) | {"max_new_tokens": 4, "quantization_bit": 4}
    adapter = str(workspace.root / "talks")
    done = workspace.command("talking", command="chat", typed="count 3\nexit\n", adapter_name_or_path=adapter, **keys)
    assert done.returncode == 0, done.stderr[-2000:]
