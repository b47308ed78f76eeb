"""A model on another device than its experts: the same losses and gradients as all on the CPU."""

import pytest
import torch
from helpers import train_on
from peft import LoraConfig
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from ktmoe import KTConfig
from ktmoe.models import attach


CONFIG = Qwen3MoeConfig(
    vocab_size=128, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=32,
    num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64,
)  # fmt: skip
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def trained(device, backend):
    """Losses of three steps with checkpointing, and the trained parameters on the CPU."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG, dtype=torch.float32).to(device)
    lora = LoraConfig(r=4, target_modules=["q_proj", "experts"], task_type="CAUSAL_LM")
    model = attach(model, KTConfig(kt_backend=backend, kt_num_threads=2, kt_max_len=64), lora=lora)
    model.to(device)  # as trainers do
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    model.train()
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for name, p in parameters.items():  # the same on every device
        p.data = torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))).mul_(0.1).to(p)
        assert p.device.type == ("cpu" if ".experts." in name else device)
    ids = torch.randint(0, 128, (2, 11), generator=torch.Generator().manual_seed(1)).to(device)
    return train_on(model, ids, 3, lr=1e-3), {n: p.detach().cpu() for n, p in parameters.items()}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", ["torch", pytest.param("AMXBF16", marks=pytest.mark.kernel)])
def test_training_equals_the_reference_on_the_cpu(device, backend):
    losses, parameters = trained(device, backend)
    expected, expected_parameters = trained("cpu", "reference")
    torch.testing.assert_close(losses, expected, rtol=2e-3, atol=0)
    for name, p in parameters.items():
        moved = (p - expected_parameters[name]).abs().mean()
        assert moved < 3e-4, name  # Adam moves each by up to 1e-3 a step, whatever the size of its gradient
