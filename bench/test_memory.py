"""Anonymous memory of `load_model` at its peak, in parts of the experts' size; pages of mapped files do not count.

Shards of 200 MB, one shared backward buffer, then a forward and a backward of a few tokens with everything else
frozen: weights are measured, not the activations that autograd keeps. Every backend has 1 GB of experts in 30 layers,
in matrices of 2048 x 1536; those that read a checkpoint's own format have 3.5 GB in 20 layers too, in matrices as
large as those of DeepSeek-V3 and Kimi K2, which are released so. LoRA of rank 8 and room for activations are 7 % of
the small matrices and 2 % of the large ones.
"""

import functools
from pathlib import Path

import pytest
import torch
from anonymous import peak
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from ktmoe.backends import TABLE, kt
from ktmoe.verify.stored_model import store_experts


# Of the experts in bf16; torch without copies of the weights.
LIMITS = {
    ("torch", "small"): 0.10,
    ("AMXBF16", "small"): 1.15,
    ("AMXInt8", "small"): 0.62,
    ("AMXFP8", "small"): 0.60,
    ("AMXInt4", "small"): 0.40,
    ("AMXFP8", "large"): 0.60,
    ("AMXInt4", "large"): 0.36,
}
MATRICES = {
    "small": {},
    "large": {"hidden_size": 7168, "moe_intermediate_size": 2048, "num_hidden_layers": 20},
}
WARM_UP = {"hidden_size": 256, "moe_intermediate_size": 256, "num_hidden_layers": 1}
CONFIG = Qwen3MoeConfig(
    vocab_size=256,
    hidden_size=2048,
    num_hidden_layers=30,
    num_attention_heads=1,
    num_key_value_heads=1,
    head_dim=32,
    num_experts=2,
    num_experts_per_tok=2,
    moe_intermediate_size=1536,
    dtype=torch.bfloat16,
)
# In a process of its own, which has trained a small model when it says "ready": what is measured is the large one, not
# the libraries.
CHILD = """
import sys, torch, ktmoe
config = ktmoe.KTConfig(kt_backend=sys.argv[1], kt_num_threads=2, kt_max_len=64, kt_share_backward="on",
    kt_torch_packing="off")

def train(model, hidden_size):
    model.requires_grad_(False)
    x = torch.randn(1, 16, hidden_size, dtype=torch.bfloat16, requires_grad=True)
    model(inputs_embeds=x).logits.float().sum().backward()
    assert x.grad.isfinite().all()

train(ktmoe.load_model(sys.argv[3], config, r=8), 256)
print("ready", flush=True)
sys.stdin.readline()
model = ktmoe.load_model(sys.argv[2], config, r=8)
train(model, model.config.hidden_size)
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Writes a model's folder, in bf16 or a stored format, once; gives it and the bytes of its experts in bf16."""
    root = tmp_path_factory.mktemp("checkpoints")

    @functools.cache
    def write(stored, **changes):
        folder = root / "-".join([stored or "bf16", *map(str, changes.values())])
        config = Qwen3MoeConfig(**{**CONFIG.to_dict(), **changes})
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.to_empty(device="cpu")
        for p in model.parameters():
            p.data.normal_(0, 0.02)
        model.save_pretrained(folder, max_shard_size="200MB")
        if stored:
            store_experts(folder, stored)
        c = config
        return folder, 6 * c.num_hidden_layers * c.num_experts * c.hidden_size * c.moe_intermediate_size

    return write


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory NOT measured: no /proc on this system")
@pytest.mark.parametrize(("name", "matrices"), LIMITS)
def test_peak_of_anonymous_memory(name, matrices, checkpoint, record_property):
    if name != "torch" and not kt.available():
        pytest.skip(f"kernel NOT verified on this host: {kt.variant()}")
    stored = TABLE[name].stored
    folder, size = checkpoint(stored, **MATRICES[matrices])
    warm_up, _ = checkpoint(stored, **WARM_UP)
    part = peak(CHILD, name, str(folder), str(warm_up)) / size
    print(f"\n{name}, {matrices} matrices: {part:.3f} of {size / 1e9:.2f} GB of experts at the peak")
    record_property("part_of_the_experts", part)
    assert part <= LIMITS[name, matrices]
