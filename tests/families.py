"""Tiny random models of every family, for any transformers from 4.40 on. Real classes; a family that the installed
release lacks is skipped, and said so.

    families.model("Qwen3-MoE")         an nn.Module in fp32
    families.config("Qwen3-MoE")        its configuration alone
    @families.each                      a test for each of them, as `family`
"""

import copy
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers


H, I, E, K, VOCAB = 64, 96, 4, 2, 128
VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
IDS = torch.randint(4, VOCAB, (2, 11), generator=torch.Generator().manual_seed(0))

_BASE = dict(
    vocab_size=VOCAB, hidden_size=H, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=2,
    max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
_MLA = dict(kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16)
# Experts as DeepSeek counts them: the first layer is dense, one expert is shared.
_SHARED = dict(
    n_routed_experts=E, n_shared_experts=1, num_experts_per_tok=K, moe_intermediate_size=I, intermediate_size=80,
    first_k_dense_replace=1,
)  # fmt: skip
_QWEN = dict(num_experts=E, num_experts_per_tok=K, moe_intermediate_size=I, head_dim=32)
_LINEAR = dict(
    layer_types=["linear_attention", "full_attention", "linear_attention"], linear_num_key_heads=2,
    linear_num_value_heads=2, linear_key_head_dim=16, linear_value_head_dim=16,
)  # fmt: skip
_VISION = dict(
    depth=1, hidden_size=32, num_heads=2, intermediate_size=32, out_hidden_size=H, num_position_embeddings=16,
    patch_size=4, deepstack_visual_indexes=[0],
)  # fmt: skip
_MROPE = {"rope_type": "default", "mrope_section": [8, 4, 4], "mrope_interleaved": True}
_ROPE = {"rope_parameters": {"rope_theta": 10000.0, **_MROPE}} if VERSION >= (5, 0) else {"rope_scaling": _MROPE}


OF_EXAMPLES = {  # an example's family, by the first letters of its name
    "deepseek_v2": "DeepSeek-V2",
    "deepseek_v3": "DeepSeek-V3",
    "mixtral": "Mixtral",
    "qwen2": "Qwen2-MoE",
    "qwen3": "Qwen3-MoE",
}


@dataclass(frozen=True)
class Family:
    """One row.

    Attributes:
        config: class of its configuration in transformers.
        options: what makes it tiny.
        auto: which auto class builds it.
        prefix: of the decoder layers' module names.
        block: attribute of a decoder layer that holds the router and the experts, in transformers 5.
        moe_layers: how many of the three layers have routed experts.
        aux_loss: whether it returns router logits and an auxiliary loss when asked to.
    """

    config: str
    options: dict[str, Any] = field(default_factory=dict)
    auto: str = "AutoModelForCausalLM"
    prefix: str = "model.layers"
    block: str = "mlp"
    moe_layers: int = 3
    aux_loss: bool = False


FAMILIES = {
    "DeepSeek-V2": Family(
        "DeepseekV2Config",
        dict(**_BASE, **_MLA, **_SHARED, q_lora_rank=24, topk_method="group_limited_greedy", n_group=2, topk_group=1,
             routed_scaling_factor=1.5),
        moe_layers=2,
    ),
    "DeepSeek-V2-Lite": Family(
        "DeepseekV2Config",
        dict(**_BASE, **_MLA, **_SHARED, q_lora_rank=None, topk_method="greedy", n_group=1, topk_group=1),
        moe_layers=2,
    ),
    "DeepSeek-V3": Family(
        "DeepseekV3Config",
        dict(**_BASE, **_MLA, **_SHARED, q_lora_rank=24, n_group=2, topk_group=1, norm_topk_prob=True),
        moe_layers=2,
    ),
    "Qwen2-MoE": Family(
        "Qwen2MoeConfig",
        dict(**_BASE, num_experts=E, num_experts_per_tok=K, moe_intermediate_size=I,
             shared_expert_intermediate_size=48),
        aux_loss=True,
    ),
    # The one that the kernel runs in tests: sizes that every one of its variants takes.
    "Qwen3-MoE": Family("Qwen3MoeConfig", dict(**_BASE, **(_QWEN | dict(moe_intermediate_size=64))), aux_loss=True),
    "Mixtral": Family(
        "MixtralConfig", dict(**_BASE, intermediate_size=I, num_local_experts=E, num_experts_per_tok=K), aux_loss=True
    ),
    "Qwen3-Next": Family(
        "Qwen3NextConfig",
        dict(**_BASE, **_QWEN, **_LINEAR, shared_expert_intermediate_size=48),
        aux_loss=True,
    ),
    "Qwen3.5-MoE": Family(
        "Qwen3_5MoeConfig",
        dict(text_config=dict(**_BASE, **_QWEN, **_LINEAR, **_ROPE, shared_expert_intermediate_size=48),
             vision_config=_VISION),
        auto="AutoModelForImageTextToText",
        prefix="model.language_model.layers",
        aux_loss=True,
    ),
    "Qwen3.5-MoE-text": Family(
        "Qwen3_5MoeTextConfig",
        dict(**_BASE, **_QWEN, **_LINEAR, **_ROPE, shared_expert_intermediate_size=48),
        aux_loss=True,
    ),
    "Qwen3-VL-MoE": Family(
        "Qwen3VLMoeConfig",
        dict(text_config=dict(**_BASE, **_QWEN, **_ROPE), vision_config=_VISION),
        auto="AutoModelForImageTextToText",
        prefix="model.language_model.layers",
        aux_loss=True,
    ),
    "GLM4-MoE": Family(
        "Glm4MoeConfig", dict(**_BASE, **_SHARED, head_dim=32, n_group=2, topk_group=1, use_qk_norm=True), moe_layers=2
    ),
    "OLMoE": Family(
        "OlmoeConfig", dict(**_BASE, intermediate_size=I, num_experts=E, num_experts_per_tok=K), aux_loss=True
    ),
    "MiniMax-M2": Family(
        "MiniMaxM2Config",
        dict(**_BASE, intermediate_size=I, num_local_experts=E, num_experts_per_tok=K, head_dim=32),
        aux_loss=True,
    ),
    "Ernie4.5-MoE": Family(
        "Ernie4_5_MoeConfig",
        dict(**_BASE, intermediate_size=80, moe_intermediate_size=I, moe_num_experts=E, moe_k=K,
             moe_num_shared_experts=1, moe_layer_start_index=1, moe_layer_end_index=-1, moe_layer_interval=1),
        moe_layers=2,
        aux_loss=True,
    ),
    "dots1": Family("Dots1Config", dict(**_BASE, **_SHARED, n_group=2, topk_group=1), moe_layers=2),
    "Phi-MoE": Family(
        "PhimoeConfig",
        dict(**_BASE, intermediate_size=I, num_local_experts=E, num_experts_per_tok=K, router_jitter_noise=0.0),
        aux_loss=True,
    ),
    "Hunyuan-v1": Family(
        "HunYuanMoEV1Config", dict(**_BASE, intermediate_size=I, num_experts=E, moe_topk=K, head_dim=32)
    ),
    "Granite-MoE": Family(
        "GraniteMoeConfig",
        dict(**_BASE, intermediate_size=I, num_local_experts=E, num_experts_per_tok=K),
        block="block_sparse_moe",
        aux_loss=True,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Refused(Family):
    """A row that ktmoe does not run.

    Attributes:
        message: regular expression that the error matches, on transformers 5.
    """

    message: str = ""


REFUSED = {
    "Llama (dense)": Refused(
        "LlamaConfig", dict(**_BASE, intermediate_size=I), message="LlamaForCausalLM has no MoE layer"
    ),
    "gpt-oss": Refused(
        "GptOssConfig",
        dict(**_BASE, num_local_experts=E, num_experts_per_tok=K, intermediate_size=I, head_dim=32),
        message="GptOssExperts .* of GptOssForCausalLM does not fit: its experts have biases",
    ),
    "Llama4": Refused(
        "Llama4TextConfig",
        dict(**_BASE, num_local_experts=E, num_experts_per_tok=K, intermediate_size=I, intermediate_size_mlp=80,
             head_dim=32),
        message="Llama4Text(Experts|Moe) .* does not fit: (it is called with .hidden_states., not|.*experts' inputs)",
    ),
    "DeepSeek-V4": Refused(
        "DeepseekV4Config",
        dict(**(_BASE | dict(num_key_value_heads=1)), n_routed_experts=E, n_shared_experts=1, num_experts_per_tok=K,
             moe_intermediate_size=I, head_dim=32, q_lora_rank=24, o_groups=2, o_lora_rank=16, index_n_heads=2,
             index_head_dim=16, index_topk=8),
        message="DeepseekV4Experts .* of DeepseekV4ForCausalLM does not fit: it has a gate function of its own",
    ),
    "NemotronH": Refused(
        "NemotronHConfig",
        dict(**{k: v for k, v in _BASE.items() if k != "num_hidden_layers"}, layers_block_type=["moe", "moe"],
             n_routed_experts=E, num_experts_per_tok=K, moe_intermediate_size=I, intermediate_size=80, head_dim=32,
             moe_shared_expert_intermediate_size=48, mamba_num_heads=2, mamba_head_dim=16, ssm_state_size=16,
             n_groups=1),
        message="NemotronHExperts .* of NemotronHForCausalLM does not fit: its experts have no gate",
    ),
    "Qwen3-MoE with gelu": Refused(
        "Qwen3MoeConfig", dict(**_BASE, **_QWEN, hidden_act="gelu"), message="its activation is .*, not silu"
    ),
}  # fmt: skip

each = pytest.mark.parametrize("family", FAMILIES)
each_refused = pytest.mark.parametrize("family", REFUSED)


def row(family: str) -> Family:
    """The row of that name; skips the test where the installed transformers does not have the family."""
    found = (FAMILIES | REFUSED)[family]
    if not hasattr(transformers, found.config):
        pytest.skip(f"{family}: transformers {transformers.__version__} does not have {found.config}")
    return found


def of_example(name: str) -> str:
    """The family of an example's model."""
    return next(family for start, family in OF_EXAMPLES.items() if name.startswith(start))


def config(family: str, **changes: Any) -> Any:
    """A fresh configuration; `changes` go to the text model's where it is nested."""
    found = row(family)
    options = copy.deepcopy(found.options)
    options.get("text_config", options).update(changes)
    return getattr(transformers, found.config)(**options)


def build(family: str, configuration: Any) -> Any:
    """The model of a configuration, with whatever weights transformers gives it."""
    return getattr(transformers, row(family).auto).from_config(configuration)


def model(family: str = "Qwen3-MoE", dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A model in eval mode with drawn weights, the same at every call; routing biases are not zero."""
    made = build(family, config(family, **changes)).eval()
    generator = torch.Generator().manual_seed(0)
    saved = made.state_dict()  # not what is computed from the configuration, as rotary tables are
    for name, tensor in (*made.named_parameters(), *made.named_buffers()):
        if tensor.is_floating_point() and name in saved:
            tensor.data.normal_(0, 0.1, generator=generator)
    return made.to(dtype)


def load(family: str, folder: Any, **options: Any) -> Any:
    """What transformers itself makes of a checkpoint, in eval mode."""
    return mended(getattr(transformers, row(family).auto).from_pretrained(folder, **options)).eval()


def mended(made: Any) -> Any:
    """A stock model, able to run: transformers 5.0 to 5.6 forget an attribute that DeepSeek-V2's routing reads."""
    for block in made.modules():
        if type(block).__name__ == "DeepseekV2Moe" and not hasattr(block, "num_experts"):
            block.num_experts = E
    return made


def logits(made: Any) -> torch.Tensor:
    """[2, 11, VOCAB], in eval mode and without gradients."""
    with torch.no_grad():
        return made.eval()(IDS).logits
