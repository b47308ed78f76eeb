"""What runs where, said when a model is ready."""

from __future__ import annotations

import torch
from torch import nn

from ktmoe import devices
from ktmoe.adapters import LoraExperts
from ktmoe.backends import TABLE, is_kernel
from ktmoe.cores import in_words, numa_nodes
from ktmoe.experts import MoEExperts
from ktmoe.models.attached import moe_layers
from ktmoe.retained import bytes_per_token
from ktmoe.split import device_bytes


def summary(model: nn.Module) -> list[str]:
    """What runs where, in a few lines: backend, CPU variant, threads, experts, trainable parameters."""
    layers = list(moe_layers(model).values())
    if not layers:
        return ["ktmoe: no routed experts are attached."]
    first = layers[0]
    where = TABLE[first.plan.backend].describe()
    if is_kernel(first.plan):
        checked = "NOT verified (kt_verify: off)" if first.config.kt_verify == "off" else "verified on this machine"
        pools = f" on {_nodes(first)}" if len(numa_nodes()) > 1 or first.plan.tp > 1 else ""
        threads = f"{first.plan.threads} thread{'s' if first.plan.threads != 1 else ''}{pools}"
        copies = "shared by all layers" if first.plan.share_backward else "of each layer's own"
        where += f", {threads}, backward weights {copies}, {checked}"
    fallen = [m for m in layers if m.plan.backend != first.plan.backend]
    others_too = f"; {len(fallen)} layers on {fallen[0].plan.backend}" if fallen else ""
    left = first.num_experts - len(first.on_device)
    size = sum(m.weights.nbytes() * left / first.num_experts for m in layers) / 1e9
    held = first.weights.stored.upper() or first.weights.dtype
    rest = {p.device.type for n, p in model.named_parameters() if ".experts." not in n}
    expert_ids = {id(p) for m in model.modules() if isinstance(m, (MoEExperts, LoraExperts)) for p in m.parameters()}
    trainable = [p for p in model.parameters() if p.requires_grad]
    of_experts = sum(p.numel() for p in trainable if id(p) in expert_ids)
    others = sum(p.numel() for p in trainable) - of_experts
    return [
        f"ktmoe: routed experts on {first.plan.backend}: {where}{others_too}",
        f"ktmoe: {len(layers)} MoE layers x {left} experts, {size:.3g} GB of {held} weights in host "
        f"memory; everything else on {', '.join(sorted(rest)) or 'cpu'}",
        f"ktmoe: trainable parameters: {of_experts:,} in expert LoRA, {others:,} elsewhere",
        *_on_device(layers),
        *_processes(first),
        _activation(layers, 4 * of_experts),
        *_slow_dtype(model),
    ]


def _on_device(layers: list[MoEExperts]) -> list[str]:
    first = layers[0]
    n, named = len(first.on_device), first.config.kt_gpu_experts
    if not n:
        return []
    how = "the first ones: ktmoe calibrate finds those with most tokens"
    if named is not None:
        how = f"those with most tokens in {named}" if isinstance(named, str) else ", ".join(map(str, named))
    size = sum(device_bytes(m.config, [m.shape(1)]) for m in layers)
    return [
        f"ktmoe: {n} of {first.num_experts} experts of each layer on {devices.accelerator()}, {size / 1e9:.3g} GB in "
        f"bf16 ({how}); they compute while the CPU computes the others"
    ]


def _processes(experts: MoEExperts) -> list[str]:
    ranks = experts.sharing.ranks if experts.sharing else None
    if ranks is None:
        return []
    own = f"{len(ranks.on_host)} process{'es' if len(ranks.on_host) > 1 else ''} of this host"
    return [
        f"ktmoe: {own}, {ranks.world} in all: rank {ranks.owner} holds this host's experts and computes them for all "
        "of its processes together; DDP's averages include their LoRA"
    ]


def _nodes(experts: MoEExperts) -> str:
    used, there = experts.plan.nodes, numa_nodes()
    others = "" if set(used) >= set(there) else f" of {', '.join(map(str, sorted(there)))}"
    if others and not experts.config.kt_tp_enabled:
        others += " (kt_tp_enabled uses more)"
    return f"NUMA {in_words(used)}{others}"


def bf16_is_slow() -> bool:
    """Whether models compute on a CPU without instructions for bf16: on AVX2 a backward took up to 60 times fp32's."""
    if torch.cuda.is_available() or not torch.backends.mkldnn.is_available():
        return False
    return not torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _slow_dtype(model: nn.Module) -> list[str]:
    dtypes = {p.dtype for p in model.parameters() if not p.requires_grad and p.device.type == "cpu"}
    if torch.bfloat16 not in dtypes or not bf16_is_slow():
        return []
    return [
        "ktmoe: everything but the routed experts is in bfloat16, which this CPU has no instructions for: many times "
        "slower than float32. In LLaMA-Factory bf16: false, in Python dtype=torch.float32."
    ]


def _activation(layers: list[MoEExperts], lora_bytes: int) -> str:
    """What is kept for gradient checkpointing, and how much memory it takes."""
    mode = layers[0].config.kt_cpu_activation
    if mode == "recompute":
        return "ktmoe: kt_cpu_activation: recompute: gradient checkpointing runs the experts' forward twice"
    per_token = sum(bytes_per_token(m.shape(1), m.compute_dtype) for m in layers) / 1e3
    limit = "" if mode == "retain" else " while a tenth of the memory is free"
    return (
        f"ktmoe: kt_cpu_activation: {mode}: gradient checkpointing does not run the experts' forward twice{limit}: "
        f"their inputs and outputs are kept ({per_token:,.0f} kB for each token of a batch, all layers together), and "
        f"a copy of their LoRA ({lora_bytes / 1e6:,.0f} MB)"
    )
