"""The specification of mixture-of-experts layers with LoRA: naive, readable, differentiable PyTorch.

Everything faster in this project is judged against these few functions. They import torch and nothing else, run in the
dtype of their inputs (fp32 or fp64), and leave the backward to autograd (INT8's rounds what its forward rounds).
"""

from ktmoe_reference.checkpointing import checkpointed_experts_forward
from ktmoe_reference.experts import LORA_NAMES, expert_forward, experts_forward, lora_linear
from ktmoe_reference.fp8 import dequantize_fp8, quantize_fp8
from ktmoe_reference.int4 import dequantize_int4, pack_int4, quantize_int4, unpack_int4
from ktmoe_reference.int8 import (
    dequantize_int8,
    int8_expert_forward,
    int8_experts_forward,
    int8_matmul,
    quantize_int8,
)
from ktmoe_reference.tensor_parallel import shard_intermediate, tensor_parallel_experts_forward


__all__ = [
    "LORA_NAMES",
    "checkpointed_experts_forward",
    "dequantize_fp8",
    "dequantize_int4",
    "dequantize_int8",
    "expert_forward",
    "experts_forward",
    "int8_expert_forward",
    "int8_experts_forward",
    "int8_matmul",
    "lora_linear",
    "pack_int4",
    "quantize_fp8",
    "quantize_int4",
    "quantize_int8",
    "shard_intermediate",
    "tensor_parallel_experts_forward",
    "unpack_int4",
]
