"""Anonymous memory of `load_model` at its peak, in parts of the experts' size; pages of mapped files do not count.

1 GB of experts in 30 layers and shards of 200 MB, one shared backward buffer, then a forward and a backward of a few
tokens with everything else frozen: weights are measured, not the activations that autograd keeps (2.5 MB for a layer
and 64 tokens). The matrices have the size of DeepSeek-V2-Lite's, 2048 x 1408.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from ktmoe.backends import kt


LIMITS = {"torch": 0.10, "AMXBF16": 1.15, "AMXInt8": 0.70}  # torch without copies of the weights
CONFIG = Qwen3MoeConfig(
    vocab_size=256,
    hidden_size=2048,
    num_hidden_layers=30,
    num_attention_heads=1,
    num_key_value_heads=1,
    head_dim=32,
    num_experts=2,
    num_experts_per_tok=2,
    moe_intermediate_size=1408,
    dtype=torch.bfloat16,
)
# In a process of its own, which has trained a small model when it says "ready": what is measured is the large one, not
# the libraries.
CHILD = """
import sys, torch, ktmoe
from transformers import AutoConfig, AutoModelForCausalLM
config = ktmoe.KTConfig(kt_backend=sys.argv[1], kt_num_threads=2, kt_max_len=64, kt_share_backward="on",
    kt_torch_packing="off")

def train(model, hidden_size):
    model.requires_grad_(False)
    x = torch.randn(1, 16, hidden_size, dtype=torch.bfloat16, requires_grad=True)
    model(inputs_embeds=x).logits.float().sum().backward()
    assert x.grad.isfinite().all()

small = AutoConfig.from_pretrained(sys.argv[2], hidden_size=64, moe_intermediate_size=64, num_hidden_layers=1)
train(ktmoe.attach(AutoModelForCausalLM.from_config(small, dtype=torch.bfloat16), config, r=8), 64)
print("ready", flush=True)
sys.stdin.readline()
train(ktmoe.load_model(sys.argv[2], config, r=8), 2048)
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The folder, and the bytes of its experts."""
    folder = tmp_path_factory.mktemp("checkpoint")
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(CONFIG)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, p in skeleton.state_dict().items():
        value = torch.empty(p.shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
        if name.endswith(".gate_up_proj"):
            for e, (gate, up) in enumerate(one.chunk(2) for one in value):
                tensors[name.replace("gate_up_proj", f"{e}.gate_proj.weight")] = gate
                tensors[name.replace("gate_up_proj", f"{e}.up_proj.weight")] = up
        elif name.endswith(".experts.down_proj"):
            tensors |= {name.replace("down_proj", f"{e}.down_proj.weight"): one for e, one in enumerate(value)}
        else:
            tensors[name] = value
    index, shard, size, count = {}, {}, 0, 0
    for i, (key, value) in enumerate(tensors.items()):
        shard[key] = value.contiguous()
        size += value.nbytes
        if size > 200e6 or i == len(tensors) - 1:
            count += 1
            save_file(shard, folder / f"model-{count}.safetensors", {"format": "pt"})
            index |= dict.fromkeys(shard, f"model-{count}.safetensors")
            shard, size = {}, 0
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    CONFIG.save_pretrained(folder)
    return folder, sum(v.nbytes for k, v in tensors.items() if ".experts." in k)


def anonymous(pid):
    """Bytes of anonymous memory that a process has."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory NOT measured: no /proc on this system")
@pytest.mark.parametrize("name", LIMITS)
def test_peak_of_anonymous_memory(name, checkpoint, record_property):
    if name != "torch" and not kt.available():
        pytest.skip(f"kernel NOT verified on this host: {kt.variant()}")
    folder, size = checkpoint
    command = [sys.executable, "-c", CHILD, name, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "ready\n"
        before = peak = anonymous(child.pid)
        child.stdin.write("\n")
        child.stdin.flush()
        while child.poll() is None:
            peak = max(peak, anonymous(child.pid))
            time.sleep(0.002)
    assert child.returncode == 0
    part = (peak - before) / size
    print(f"\n{name}: {part:.3f} of {size / 1e9:.2f} GB of experts at the peak")
    record_property("part_of_the_experts", part)
    assert part <= LIMITS[name]
