"""Attaching to real transformers models, and adapters that stock peft reads. Tiny random models, real classes."""

import warnings

import families
import peft
import pytest
import torch
from families import IDS, logits, model
from helpers import BF16_KERNELS, relative
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file

import ktmoe
from ktmoe import KTConfig, KTError
from ktmoe.adapters.model import get_peft_model
from ktmoe.models import attach, check_model, startup, summary


# Those whose adapters are tried here; tests/test_families.py has all.
FAMILIES = ("Qwen3-MoE", "Qwen2-MoE", "Mixtral", "DeepSeek-V2-Lite", "DeepSeek-V3")
REFERENCE = KTConfig(kt_backend="reference")


def lora(*targets, **options):
    return LoraConfig(**dict(r=4, lora_alpha=8, task_type="CAUSAL_LM", target_modules=list(targets)) | options)


def moved(peft_model, seed=0):
    """The same adapter with weights that matter."""
    g = torch.Generator().manual_seed(seed)
    for p in peft_model.parameters():
        if p.requires_grad:
            p.data = torch.randn(p.shape, generator=g) * 0.05
    return peft_model


every_family = pytest.mark.parametrize("family", FAMILIES)


@every_family
def test_an_adapter_round_trips_and_stock_peft_reads_it(family, tmp_path):
    trained = moved(attach(model(family), REFERENCE, lora=lora("q_proj", "o_proj", "experts")))
    expected = logits(trained)
    trained.save_pretrained(tmp_path)

    again = ktmoe.load_adapter(attach(model(family), REFERENCE), tmp_path)
    assert torch.equal(logits(again), expected)
    assert not any(p.requires_grad for p in again.parameters())
    again = ktmoe.load_adapter(attach(model(family), REFERENCE), tmp_path, is_trainable=True)
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n for n, p in trained.named_parameters() if p.requires_grad
    }
    if peft.__version__ >= "0.20":
        assert relative(logits(PeftModel.from_pretrained(model(family), tmp_path)), expected) < 1e-6


def test_stock_peft_adapter_is_read(tmp_path):
    """The other way: an adapter in PEFT's per-expert format that somebody else wrote."""
    ours = moved(attach(model(), REFERENCE, lora=lora("experts")))
    ours.save_pretrained(tmp_path)
    tensors = {k: torch.randn_like(v) * 0.05 for k, v in load_file(tmp_path / "adapter_model.safetensors").items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    mine = ktmoe.load_adapter(attach(model(), REFERENCE), tmp_path)
    if "0.20" <= peft.__version__:
        assert relative(logits(mine), logits(PeftModel.from_pretrained(model(), tmp_path))) < 1e-5
    a = mine.get_submodule("base_model.model.model.layers.1.mlp.experts").stacked("default")["up_proj.lora_A"]
    assert torch.equal(a[2], tensors["base_model.model.model.layers.1.mlp.experts.2.up_proj.lora_A.weight"])


@pytest.mark.parametrize("family", ["Qwen2-MoE", "DeepSeek-V3"])
def test_all_linear_trains_shared_experts_and_dense_layers_too(family, tmp_path):
    trained = moved(attach(model(family), REFERENCE, lora=lora(target_modules="all-linear")))
    names = [n for n, p in trained.named_parameters() if p.requires_grad]
    assert any("shared_expert" in n for n in names)
    assert any(".mlp.experts.lora_A.default.gate_proj" in n for n in names)
    trained.save_pretrained(tmp_path)
    again = ktmoe.load_adapter(attach(model(family), REFERENCE), tmp_path)
    assert torch.equal(logits(again), logits(trained))


@pytest.mark.parametrize(
    ("targets", "reached"),
    [
        (["experts"], True),
        (["gate_proj", "up_proj", "down_proj"], True),
        ("all-linear", True),
        (r".*\.(q_proj|experts\.\d+\.(gate|up|down)_proj)", True),
        (["q_proj"], False),
        (r".*\.q_proj", False),
    ],
)
def test_which_targets_reach_the_experts(targets, reached, recwarn):
    made = get_peft_model(attach(model(), REFERENCE), lora(target_modules=targets))
    assert any(".experts.lora_A" in n for n, _ in made.named_parameters()) == reached
    assert any("leaves the routed experts without LoRA" in str(w.message) for w in recwarn) == (not reached)


@pytest.mark.parametrize("inject", [peft.get_peft_model, get_peft_model])
def test_experts_that_stock_peft_left_out_are_said_once(inject, monkeypatch, recwarn):
    monkeypatch.setattr("ktmoe.notices._said", set())
    warnings.simplefilter("always")
    trained = inject(attach(model(), REFERENCE), lora("q_proj", "gate_proj", "up_proj", "down_proj"))

    def said(train, grad):
        with torch.set_grad_enabled(grad):
            trained.train(train)(input_ids=torch.arange(8)[None])
        return len([w for w in recwarn if "have no LoRA" in str(w.message)])

    left_out = inject is peft.get_peft_model
    assert [said(True, False), said(False, True), said(True, True), said(True, True)] == [0, 0, left_out, left_out]


def test_disable_adapter_second_adapter_and_set_adapter():
    attached = attach(model(), REFERENCE)
    base = logits(attached)
    trained = moved(get_peft_model(attached, lora("experts", "q_proj")))
    first = logits(trained)
    with trained.disable_adapter():
        assert torch.equal(logits(trained), base)
    assert torch.equal(logits(trained), first)
    trained.add_adapter("other", lora("experts", r=2, use_rslora=True))
    trained.set_adapter("other")
    assert torch.equal(logits(trained), base)  # B starts at zero
    moved(trained, seed=1)
    second = logits(trained)
    assert relative(second, base) > 1e-4
    trained.set_adapter("default")
    assert torch.equal(logits(trained), first)
    trained.base_model.set_adapter(["default", "other"])
    both = logits(trained)
    assert relative(both, first) > 1e-4
    assert relative(both, second) > 1e-4
    trained.delete_adapter("other")
    trained.set_adapter("default")
    assert torch.equal(logits(trained), first)


def test_initialisation_is_peft_s():
    torch.manual_seed(0)
    made = attach(model(), REFERENCE, lora=lora("experts"))
    layer = made.get_submodule("base_model.model.model.layers.0.mlp.experts")
    for name, p in layer.stacked("default").items():
        assert p.dtype == torch.float32
        if name.endswith("lora_B"):
            assert not p.any()
        else:
            bound = p.shape[2] ** -0.5
            assert 0.9 * bound < p.abs().max() <= bound
            assert abs(p.mean()) < 0.1 * bound
    assert layer.scaling["default"] == 2.0


@pytest.mark.parametrize("name", BF16_KERNELS)
def test_a_model_on_the_kernel(name, tmp_path):
    """bf16 model, kernel-backed experts, LoRA on experts and attention: loss and gradients as the reference's."""
    found = {}
    for backend in (name, "reference"):
        config = KTConfig(kt_backend=backend, kt_max_len=64, kt_num_threads=2)
        m = moved(attach(model(dtype=torch.bfloat16), config, lora=lora("experts", "q_proj"))).train()
        loss = m(IDS, labels=IDS).loss
        loss.backward()
        found[backend] = [loss.detach(), *(p.grad for p in m.parameters() if p.requires_grad)]
    assert relative(found[name][0], found["reference"][0]) < 0.02
    # a bf16 model amplifies: the layers above and below round at every operation
    assert all(relative(a, b) < 0.35 for a, b in zip(*found.values(), strict=True))


def test_summary_says_what_runs_where():
    made = attach(model(), REFERENCE, lora=lora("experts", "q_proj"))
    text = "\n".join(summary(made))
    in_experts = sum(p.numel() for n, p in made.named_parameters() if p.requires_grad and ".experts." in n)
    others = sum(p.numel() for n, p in made.named_parameters() if p.requires_grad) - in_experts
    assert "reference" in text
    assert "3 MoE layers x 4 experts" in text
    assert f"{in_experts:,} in expert LoRA, {others:,} elsewhere" in text


@pytest.mark.parametrize(
    ("dtype", "slow", "said"), [(torch.bfloat16, True, 1), (torch.bfloat16, False, 0), (torch.float32, True, 0)]
)
def test_bf16_without_instructions_for_it_is_said(monkeypatch, dtype, slow, said):
    monkeypatch.setattr(startup, "bf16_is_slow", lambda: slow)
    lines = summary(attach(model(dtype=dtype), REFERENCE, lora=lora("experts")))
    assert sum("many times slower than float32" in line for line in lines) == said


def test_a_checkpoint_without_experts_is_not_written(tmp_path):
    attached = attach(model(), REFERENCE)
    with pytest.raises(KTError, match="checkpoint without experts"):
        attached.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_sizes_are_checked_before_anything_is_loaded():
    config = families.config("Qwen3-MoE", moe_intermediate_size=48)
    with pytest.raises(KTError, match=r"intermediate_size: the model has 48.*multiple of 32"):
        check_model(config, KTConfig(kt_backend="AMXBF16"), 4)
    with pytest.raises(KTError, match="lora_rank: got 0"):
        check_model(families.config("Qwen3-MoE"), REFERENCE, 0)
    with pytest.raises(KTError, match="attached already"):
        attach(attach(model(), REFERENCE), REFERENCE)
    with torch.device("meta"):
        skeleton = families.build("Qwen3-MoE", families.config("Qwen3-MoE"))
    with pytest.raises(KTError, match="meta device"):
        attach(skeleton, REFERENCE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(use_dora=True), "use_dora"),
        (dict(init_lora_weights="pissa"), "init_lora_weights"),
        (dict(rank_pattern={"up_proj": 8}), "rank_pattern"),
        (dict(target_modules=["gate_proj"]), "covers gate_proj, up_proj, down_proj together"),
    ],
)
def test_lora_variants_that_the_experts_do_not_have(options, message):
    with pytest.raises(KTError, match=message):
        attach(model(), REFERENCE, lora=lora("experts", **options))


def test_a_damaged_adapter_is_refused_whole(tmp_path):
    moved(attach(model(), REFERENCE, lora=lora("experts"))).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    good = load_file(path)
    key = "base_model.model.model.layers.1.mlp.experts.2.up_proj.lora_A.weight"
    for change, message in [
        ({key: None}, f"1 missing, e.g. {key}"),
        ({key: torch.zeros(5, 64)}, r"1 of a wrong shape.*\(5, 64\), expected \(4, 64\)"),
        ({key.replace("experts.2", "experts.9"): torch.zeros(4, 64)}, "1 not expected"),
    ]:
        save_file({k: v for k, v in (good | change).items() if v is not None}, path, metadata={"format": "pt"})
        target = attach(model(), REFERENCE)
        with pytest.raises(KTError, match=message):
            ktmoe.load_adapter(target, tmp_path)


def test_detach_gives_transformers_its_experts_back(tmp_path):
    made = model()
    before = made(IDS).logits
    types = {n: type(m) for n, m in made.named_modules()}
    parameters = dict(made.named_parameters())
    wrapped = attach(made, REFERENCE, lora=lora("experts"))
    with pytest.raises(KTError, match=r"adapters are around.*unload"):
        ktmoe.detach(wrapped.get_base_model())
    bare = wrapped.unload()
    assert ktmoe.detach(bare) is bare
    assert {n: type(m) for n, m in bare.named_modules()} == types
    assert all(p is parameters[n] for n, p in bare.named_parameters())
    assert torch.equal(bare(IDS).logits, before)
    bare.save_pretrained(tmp_path)
    with pytest.raises(KTError, match="nothing to detach"):
        ktmoe.detach(bare)
    attach(bare, REFERENCE, r=2)  # and again
    torch.testing.assert_close(bare(IDS).logits, before)


def test_layers_that_share_their_experts_are_refused():
    made = model()
    made.model.layers[1].mlp.experts = made.model.layers[0].mlp.experts
    with pytest.raises(KTError, match="share their experts"):
        attach(made, REFERENCE)
