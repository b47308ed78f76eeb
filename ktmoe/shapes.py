"""Layer shapes of released models: one list for benchmarks, verification, tests and the documentation's tables."""

from __future__ import annotations

from ktmoe.types import MoEShape


# Sizes as in each model's config.json; r = 8 is LLaMA-Factory's default.
SHAPES = {
    "small, r=64": MoEShape(num_experts=8, hidden_size=256, intermediate_size=128, top_k=2, rank=64),
    "SmolLM2-135M, upcycled": MoEShape(num_experts=8, hidden_size=576, intermediate_size=1536, top_k=2, rank=8),
    "Qwen3-30B-A3B": MoEShape(num_experts=128, hidden_size=2048, intermediate_size=768, top_k=8, rank=8),
    "DeepSeek-V2-Lite": MoEShape(num_experts=64, hidden_size=2048, intermediate_size=1408, top_k=6, rank=8),
    "Qwen2-57B-A14B": MoEShape(num_experts=64, hidden_size=3584, intermediate_size=2560, top_k=8, rank=8),
    "Mixtral-8x7B": MoEShape(num_experts=8, hidden_size=4096, intermediate_size=14336, top_k=2, rank=8),
    "DeepSeek-V2": MoEShape(num_experts=160, hidden_size=5120, intermediate_size=1536, top_k=6, rank=8),
    "DeepSeek-V3": MoEShape(num_experts=256, hidden_size=7168, intermediate_size=2048, top_k=8, rank=8),
}
