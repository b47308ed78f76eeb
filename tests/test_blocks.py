"""MoE blocks of transformers 4 and of remote code: models as the stock ones, on whichever release is installed.

On transformers 5 only Granite-MoE has such a block, until 5.6.
"""

import importlib
import re
import types
from pathlib import Path

import families
import pytest
import torch
import transformers
from families import IDS, VERSION, E, H, I, K
from helpers import relative
from torch import nn

import ktmoe
from ktmoe import KTConfig, KTError
from ktmoe.models import attach, check_model, detach, expert_shapes, moe_layers, unwrapped_layers
from ktmoe.models.families import ROWS, find


REFERENCE = KTConfig(kt_backend="reference")
FAMILIES = list(families.FAMILIES) if VERSION < (5, 0) else ["Granite-MoE"]
NOISE = {
    "Mixtral": dict(router_jitter_noise=0.1),
    "Phi-MoE": dict(router_jitter_noise=0.1, input_jitter_noise=0.1),
}
each = pytest.mark.parametrize("family", FAMILIES)


def with_blocks(family, **changes):
    """The model, if its blocks are such."""
    made = families.model(family, **changes)
    if all(layer.row is None for layer in find(made).values()):
        pytest.skip(f"{family}: transformers {transformers.__version__} stacks its experts in a plain module")
    return made


def step(made, **options):
    """Loss, router logits and all gradients of a training step, the random numbers of the stock model."""
    torch.manual_seed(1)
    made.train()
    made.zero_grad()
    embedded = []
    hook = made.get_input_embeddings().register_forward_hook(lambda module, args, out: embedded.append(out))
    out = made(input_ids=IDS, labels=IDS, **options)
    hook.remove()
    embedded[0].retain_grad()
    out.loss.backward()
    grads = {n: p.grad.clone() for n, p in made.named_parameters() if p.grad is not None}
    made.eval()
    return out, grads | {"embeddings": embedded[0].grad}


def assert_same_gradients(got, expected):
    outside = {n: g for n, g in expected.items() if not is_expert(n)}
    assert set(got) == set(outside)
    for name, grad in outside.items():
        # Of the largest: a router's gradient is a small difference of large sums.
        assert (got[name] - grad).abs().max() <= 3e-5 * grad.abs().max(), name


def is_expert(name):
    return ".experts." in name or "put_linear." in name


@each
def test_equals_the_stock_model(family):
    noise = NOISE.get(family, {})
    stock, attached = with_blocks(family, **noise), attach(with_blocks(family, **noise), REFERENCE)
    assert len(moe_layers(attached)) == families.FAMILIES[family].moe_layers
    assert unwrapped_layers(attached) == []
    assert {n: type(m).__name__ for n, m in stock.named_modules() if not is_expert(f"{n}.")}.items() <= {
        n: type(m).__name__ for n, m in attached.named_modules()
    }.items() | {(n, "ModuleList") for n in moe_layers(attached)} | {
        (n, type(m).__name__) for n, m in stock.named_modules() if n in moe_layers(attached)
    }
    assert relative(families.logits(attached), families.logits(stock)) < 1e-5
    asked = families.FAMILIES[family].aux_loss and VERSION < (5, 0)  # Granite before 5.7 itself fails there
    options = dict(output_router_logits=True) if asked else {}
    (a, expected), (b, got) = step(stock, **options), step(attached, **options)
    torch.testing.assert_close(b.loss, a.loss)
    if options:
        assert len(b.router_logits) == len(a.router_logits) == families.FAMILIES[family].moe_layers
        for mine, theirs in zip(b.router_logits, a.router_logits, strict=True):
            torch.testing.assert_close(mine, theirs)
        torch.testing.assert_close(b.aux_loss, a.aux_loss)
        assert a.aux_loss > 0
    assert_same_gradients(got, expected)
    prompt = IDS[:, :5]
    assert torch.equal(*(m.generate(prompt, max_new_tokens=5, do_sample=False) for m in (stock, attached)))


@each
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(family, reentrant):
    stock, attached = with_blocks(family), attach(with_blocks(family), REFERENCE)
    attached.gradient_checkpointing_enable({"use_reentrant": reentrant})
    (_, expected), (_, got) = step(stock), step(attached)
    assert_same_gradients(got, expected)


@each
def test_the_torch_backend(family):
    stock, attached = with_blocks(family), attach(with_blocks(family), KTConfig(kt_backend="torch"))
    assert relative(families.logits(attached), families.logits(stock)) < 0.02


@each
def test_detach_gives_the_stock_model_back(family):
    made = with_blocks(family)
    before = families.logits(made)
    modules, parameters = {n: (m, type(m)) for n, m in made.named_modules()}, dict(made.named_parameters())
    attach(made, REFERENCE)
    assert not any(is_expert(n) for n, _ in made.named_parameters())
    detach(made)
    assert {n: (m, type(m)) for n, m in made.named_modules()} == modules
    assert all(p is parameters[n] for n, p in made.named_parameters())
    assert torch.equal(families.logits(made), before)
    attach(made, REFERENCE)
    assert relative(families.logits(made), before) < 1e-5


@each
def test_forwards_that_somebody_keeps(family):
    """4.57 leaves a block's forward as an attribute once it recorded router logits; hooks keep it too."""
    from accelerate.hooks import ModelHook, add_hook_to_module

    stock, made = with_blocks(family), with_blocks(family)
    blocks = [layer.block for layer in find(made).values()]
    for number, block in enumerate(blocks):
        block.forward = types.MethodType(type(block).forward, block)
        if number:
            add_hook_to_module(block, ModelHook())
    expected = families.logits(stock)
    attach(made, REFERENCE)
    calls = []
    for experts in moe_layers(made).values():
        experts.register_forward_hook(lambda *args: calls.append(1))
    assert relative(families.logits(made), expected) < 1e-5
    assert len(calls) == len(blocks)
    detach(made)
    assert torch.equal(families.logits(made), expected)


@each
def test_load_model(family, tmp_path):
    with_blocks(family).save_pretrained(tmp_path, max_shard_size="100KB")
    stock = getattr(transformers, families.FAMILIES[family].auto).from_pretrained(tmp_path).eval()
    streamed = ktmoe.load_model(tmp_path, REFERENCE, r=4)
    assert len(moe_layers(streamed)) == families.FAMILIES[family].moe_layers
    assert relative(families.logits(streamed), families.logits(stock)) < 1e-5


@each
def test_sizes_from_the_configuration_alone(family):
    with_blocks(family)
    (shape,) = expert_shapes(families.config(family), 3)
    i = 64 if family == "Qwen3-MoE" else I
    assert shape == ktmoe.types.MoEShape(num_experts=E, hidden_size=H, intermediate_size=i, top_k=K, rank=3)


# Blocks whose models need more than a text configuration, or whose family is not among the tiny models.
SIZES = dict(
    hidden_size=H, intermediate_size=I, moe_intermediate_size=I, num_experts=E, num_local_experts=E,
    n_routed_experts=E, num_experts_per_tok=K, n_shared_experts=1, n_group=2, topk_group=1,
    shared_expert_intermediate_size=48,
)  # fmt: skip
OTHERS = {
    "FlexOlmoSparseMoeBlock": ("flex_olmo", "FlexOlmoConfig"),
    "Glm4vMoeTextMoE": ("glm4v_moe", "Glm4vMoeTextConfig"),
    "GraniteMoeHybridMoE": ("granitemoehybrid", "GraniteMoeHybridConfig"),
    "GraniteMoeSharedMoE": ("granitemoeshared", "GraniteMoeSharedConfig"),
    "JambaSparseMoeBlock": ("jamba", "JambaConfig"),
    "MiniMaxSparseMoeBlock": ("minimax", "MiniMaxConfig"),
    "Qwen3OmniMoeTalkerTextSparseMoeBlock": ("qwen3_omni_moe", "Qwen3OmniMoeTalkerTextConfig"),
    "Qwen3OmniMoeThinkerTextSparseMoeBlock": ("qwen3_omni_moe", "Qwen3OmniMoeTextConfig"),
}


class OneBlock(nn.Module):
    def __init__(self, block, config):
        super().__init__()
        self.mlp, self.config = block, config


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("training", [False, True])
def test_one_row_per_block(name, training):
    folder, config_name = OTHERS[name]
    try:
        modeling = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    except ModuleNotFoundError:
        pytest.skip(f"transformers {transformers.__version__} does not have {folder}")
    configuration = importlib.import_module(f"transformers.models.{folder}.configuration_{folder}")
    if not hasattr(modeling, name):
        pytest.skip(f"transformers {transformers.__version__} does not have {name}")
    config = getattr(configuration, config_name)(**SIZES)
    config.router_jitter_noise = 0.1
    made = OneBlock(getattr(modeling, name)(config), config).train(training)
    if all(layer.row is None for layer in find(made).values()):
        pytest.skip(f"{name}: transformers {transformers.__version__} stacks its experts in a plain module")
    generator = torch.Generator().manual_seed(0)
    for tensor in (*made.parameters(), *made.buffers()):
        tensor.data.normal_(0, 0.1, generator=generator)
    found = []
    for after in (lambda: None, lambda: attach(made, REFERENCE)):
        after()
        torch.manual_seed(1)
        x = torch.randn(2, 5, H, requires_grad=True)
        out = made.mlp(x * 1)
        parts = out if isinstance(out, tuple) else (out,)
        torch.manual_seed(2)
        sum((part * torch.randn_like(part)).sum() for part in parts).backward()
        outside = {n: p.grad for n, p in made.named_parameters() if not is_expert(n)}
        found.append([*parts, x.grad, *(outside[n] for n in sorted(outside))])
        made.zero_grad()
    assert len(found[0]) == len(found[1])
    for theirs, mine in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())


def test_every_row_is_tested():
    """None is for a class that no test meets, as far as the release has it."""
    models = Path(transformers.__file__).parent / "models"
    classes = set(re.findall(r"^class (\w+)\(", "".join(f.read_text() for f in models.glob("*/modeling_*.py")), re.M))
    here = [f for f in FAMILIES if hasattr(transformers, families.FAMILIES[f].config)]
    tried = {type(layer.block).__name__ for f in here for layer in find(families.model(f)).values() if layer.row}
    assert tried | set(OTHERS) >= {name for name in ROWS if name in classes and VERSION < (5, 0)}


# Models of transformers 4 that do not fit, and what is said. Those of tests/families.py say it differently there.
REFUSED = {
    "Dbrx": ("DbrxConfig", dict(d_model=H, n_heads=2, n_layers=1, max_seq_len=64, vocab_size=128),
             "DbrxFFN .* of DbrxForCausalLM does not fit: its experts share one matrix"),
    "JetMoE": ("JetMoeConfig", dict(SIZES, num_hidden_layers=1, num_key_value_heads=2, kv_channels=16, vocab_size=128),
               "JetMoeMoE .* of JetMoeForCausalLM does not fit: a bias is added"),
    "LongCat": ("LongcatFlashConfig",
                dict(SIZES, num_layers=1, num_attention_heads=2, vocab_size=128, ffn_hidden_size=I, moe_topk=K,
                     expert_ffn_hidden_size=I, zero_expert_num=2, q_lora_rank=24, kv_lora_rank=32, head_dim=16,
                     qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16),
                "LongcatFlashMoE .* of LongcatFlashForCausalLM does not fit: some of its experts are the identity"),
    "Doge": ("DogeConfig", dict(SIZES, is_moe=True, num_attention_heads=2, num_hidden_layers=1, vocab_size=128,
                                num_experts=16),
             "DogeCDMoE .* of DogeForCausalLM does not fit"),
    "Llama4": ("Llama4TextConfig", families.REFUSED["Llama4"].options, "Llama4TextMoe .* scale the experts' inputs"),
    "gpt-oss": ("GptOssConfig", families.REFUSED["gpt-oss"].options, "GptOssExperts .* its experts have biases"),
    "Llama": ("LlamaConfig", families.REFUSED["Llama (dense)"].options, "LlamaForCausalLM has no MoE layer"),
    "Qwen3-MoE with gelu": ("Qwen3MoeConfig", families.REFUSED["Qwen3-MoE with gelu"].options,
                            "Qwen3MoeSparseMoeBlock .* does not fit: its activation is GELUActivation, not silu"),
    "DeepSeek-V2 with biases": ("DeepseekV2Config",
                                dict(families.FAMILIES["DeepSeek-V2-Lite"].options, mlp_bias=True),
                                "DeepseekV2MoE .* expert 0 is DeepseekV2MLP with biases"),
}  # fmt: skip


@pytest.mark.skipif(VERSION >= (5, 0), reason="transformers 5 refuses by its stacked modules: tests/test_families.py")
@pytest.mark.parametrize("name", REFUSED)
def test_models_that_do_not_fit_are_refused_by_name(name):
    config_name, options, message = REFUSED[name]
    if not hasattr(transformers, config_name):
        pytest.skip(f"transformers {transformers.__version__} does not have {config_name}")
    config = getattr(transformers, config_name)(**options)
    with pytest.raises(KTError, match=message):
        check_model(config, REFERENCE, 4)
    made = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(KTError, match=message):
        attach(made, REFERENCE)


@pytest.mark.skipif(VERSION >= (5, 0), reason="transformers 5 stacks experts")
def test_a_block_without_a_row_is_refused_by_name():
    made = families.model("Mixtral")
    block = made.model.layers[1].block_sparse_moe
    for module, message in (
        (
            "transformers.models.new.modeling_new",
            "NewBlock .* calls its experts one by one.*transformers 5.2",
        ),
        ("transformers_modules.new", "NewBlock .* comes from transformers_modules.new, .*leave out trust_remote_code"),
    ):
        block.__class__ = type("NewBlock", (type(block),), {"__module__": module})
        with pytest.raises(KTError, match=message):
            attach(made, REFERENCE)
