"""`python bench/budgets.py`: the table of docs/families.md, what training released models takes; nothing is loaded.

Sizes as in each model's config.json on the hub.
"""

import peft
import transformers

from ktmoe import KTConfig, budget


_QWEN3 = dict(
    vocab_size=151936, num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8,
)  # fmt: skip
CONFIGS = {
    "DeepSeek-V2-Lite": transformers.DeepseekV2Config(
        vocab_size=102400, hidden_size=2048, intermediate_size=10944, moe_intermediate_size=1408, num_hidden_layers=27,
        num_attention_heads=16, num_key_value_heads=16, n_shared_experts=2, n_routed_experts=64, num_experts_per_tok=6,
        kv_lora_rank=512, q_lora_rank=None, qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128,
        first_k_dense_replace=1, n_group=1, topk_group=1,
    ),
    "Qwen3-30B-A3B": transformers.Qwen3MoeConfig(
        hidden_size=2048, num_hidden_layers=48, num_attention_heads=32, moe_intermediate_size=768,
        intermediate_size=6144, **_QWEN3,
    ),
    "Mixtral-8x7B": transformers.MixtralConfig(),  # whose defaults are its sizes
    "Mixtral-8x22B": transformers.MixtralConfig(
        hidden_size=6144, intermediate_size=16384, num_hidden_layers=56, num_attention_heads=48, vocab_size=32768,
    ),
    "Qwen3-235B-A22B": transformers.Qwen3MoeConfig(
        hidden_size=4096, num_hidden_layers=94, num_attention_heads=64, moe_intermediate_size=1536,
        intermediate_size=12288, **_QWEN3,
    ),
    "DeepSeek-V3": transformers.DeepseekV3Config(),  # likewise
    "Kimi-K2": transformers.DeepseekV3Config(
        vocab_size=163840, num_attention_heads=64, num_key_value_heads=64, n_routed_experts=384, n_group=1,
        topk_group=1, first_k_dense_replace=1,
    ),
}  # fmt: skip


def main():
    for name, config in CONFIGS.items():
        lora = peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
        found = budget.make(config, lora, budget.Batch(1, 4096), KTConfig(), on_cpu=True)
        ways = {tuple(way.keys.values()): way for way in (*found.ways, *found.others)}
        shared = ways["AMXBF16", "on"]
        experts_lora, retained = (part.size for part in found.host)
        rest, rest_lora, activations = (part.size for part in found.device[:3])
        cells = (
            ways["AMXBF16", "off"].size,
            shared.size,
            ways["AMXInt8", "on"].size,
            experts_lora,
            retained + shared.activations,
            rest + rest_lora,
            activations,
        )
        print("|", name, "|", " | ".join(f"{size / 1e9:.1f}" for size in cells), "|", flush=True)


if __name__ == "__main__":
    main()
