"""Finding the routed experts of a transformers model and putting `MoEExperts` in their place."""

from __future__ import annotations

import functools
import inspect
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ktmoe import granite
from ktmoe.adapters import check_lora_config, get_peft_model
from ktmoe.backends import kernel, plan
from ktmoe.checkpoint import Checkpoint
from ktmoe.checkpoint_names import CheckpointNames
from ktmoe.config import KTConfig
from ktmoe.experts import MoEExperts
from ktmoe.peft_layer import LoraExperts
from ktmoe.types import ExpertWeights, KTError, MoEShape


if TYPE_CHECKING:
    from peft import LoraConfig


def attach(
    model: nn.Module,
    config: KTConfig | None = None,
    lora: LoraConfig | None = None,
    r: int | None = None,
    *,
    checkpoint: Checkpoint | None = None,
) -> nn.Module:
    """Moves the routed experts of a model that is in memory to ktmoe, in place.

    The experts' own tensors stay referenced as the source of checks and exact recomputes; nothing else changes.

    Args:
        model: any transformers 5 model whose experts are plain (gated by silu, no bias, applied after the router).
        config: which backend, threads, limits.
        lora: if given, the adapter is added too, on the experts and on the rest.
        r: the largest LoRA rank that adapters will have, where `lora` does not say it. With neither, the experts are
            loaded when they are first needed.
        checkpoint: the files that the experts come from, where the model has them without weights.

    Returns:
        The model, or a PeftModel around it if `lora` was given.

    Raises:
        KTError: no MoE layer, experts that are not plain, or sizes that the backend cannot take. It stays as it was.
        KernelError: the kernel failed a check.
    """
    config = config or KTConfig()
    rank = lora.r if lora is not None else r
    if lora is not None:
        check_lora_config(lora)
    replaced: dict[str, MoEExperts] = {}
    changed = granite.unify(model)
    try:
        found = _find(model)
        tensors = {name: _host_tensors(module) for name, (module, _) in found.items()}
        weights = {name: _weights(*pair) for name, pair in tensors.items()}
        if checkpoint is not None:
            sizes = {name: (w.num_experts, w.intermediate_size, w.hidden_size) for name, w in weights.items()}
            weights = checkpoint.experts(sizes, CheckpointNames(model, found))
        for name, (module, top_k) in found.items():
            if checkpoint is None:
                _check_loaded(name, module)
            replaced[name] = MoEExperts(weights[name], top_k=top_k, config=config)
            plan(config, replaced[name].shape(rank or 1))
        if rank:  # before the model is touched: a kernel that fails its checks leaves it as it was
            _load(replaced, rank, streamed=checkpoint is not None)
    except BaseException:
        for experts in replaced.values():
            experts.close()
        granite.restore(changed)
        raise
    for name, experts in replaced.items():
        module = found[name][0]
        if checkpoint is None:
            module.gate_up_proj.data, module.down_proj.data = tensors[name]  # a copy that was on a GPU is freed
            experts.original = (module,)
        experts.train(module.training)
        put(model, name, experts)
        _mend(model.get_submodule(name.rpartition(".")[0]), experts)
    _refuse_saving(model)
    if lora is None:
        return model
    try:
        return get_peft_model(model, lora)
    except BaseException:
        for name, experts in replaced.items():
            put(model, name, found[name][0])
            experts.close()
        granite.restore(changed)
        _allow_saving(model)
        raise


def _load(layers: dict[str, MoEExperts], rank: int, streamed: bool) -> None:
    """Loads every layer into its backend, with a bar that shows bytes per second."""
    packs = next(iter(layers.values())).plan.is_kernel
    what = f"{'Packing' if packs else 'Mapping'} experts{' from disk' if streamed else ''}"
    size = sum(experts.weights.nbytes() for experts in layers.values())
    quiet = len(layers) < 8 or not (packs or streamed)
    with tqdm(total=size, desc=what, unit="B", unit_scale=True, disable=quiet) as bar:
        for experts in layers.values():
            experts.load(rank)
            bar.update(experts.weights.nbytes())


def _mend(block: Any, experts: MoEExperts) -> None:
    """DeepSeek-V2's group-limited routing reads an attribute that transformers 5.0 to 5.6 do not set."""
    if type(block).__name__ == "DeepseekV2Moe" and not hasattr(block, "num_experts"):
        block.num_experts = experts.num_experts


def detach(model: nn.Module) -> nn.Module:
    """Gives an attached model transformers' own experts back, in place and on the CPU, and closes the backends.

    Raises:
        KTError: nothing is attached, adapters are still around the experts, or `load_model` made the model. It stays
            as it was.
    """
    layers = moe_layers(model)
    if not layers:
        raise KTError(f"{type(model).__name__} has no routed experts that ktmoe runs: there is nothing to detach.")
    if any(isinstance(m, LoraExperts) for m in model.modules()):
        raise KTError(
            "detach: adapters are around the routed experts. Save them if they are wanted, take them off with "
            "`model = peft_model.unload()`, and detach that model."
        )
    if not all(experts.original for experts in layers.values()):
        raise KTError(
            "detach: this model's routed experts were streamed from disk and are nowhere in memory. Load the model "
            "with transformers instead."
        )
    for name, experts in layers.items():
        put(model, name, experts.original[0].train(experts.training))
        experts.close()
    granite.restore(granite.unified(model))
    _allow_saving(model)
    return model


def check_model(model_config: Any, config: KTConfig, r: int) -> None:
    """Refuses, from the configuration alone, a model that `attach` would refuse. Nothing is loaded.

    Args:
        model_config: a transformers configuration.
        config: which backend.
        r: LoRA rank.

    Raises:
        KTError: as `attach`.
    """
    for shape in expert_shapes(model_config, r):
        plan(config, shape)


def auto_class(model_config: Any) -> Any:
    """The auto class that makes a configuration's language model: with its vision part, where it has one."""
    import transformers

    seeing = getattr(transformers, "AutoModelForImageTextToText", None)
    seen = seeing is not None and type(model_config) in seeing._model_mapping
    return seeing if seen else transformers.AutoModelForCausalLM


def expert_shapes(model_config: Any, r: int) -> list[MoEShape]:
    """The sizes of a model's MoE layers, each once, from the configuration alone.

    Raises:
        KTError: no MoE layer, experts that are not plain, or a rank that is no whole number above zero.
    """
    if isinstance(r, bool) or not isinstance(r, int) or r < 1:
        raise KTError(f"lora_rank: got {r!r}; expected a whole number of at least 1.")
    try:
        with torch.device("meta"), warnings.catch_warnings(action="ignore"):
            skeleton = auto_class(model_config).from_config(model_config, trust_remote_code=False)
        granite.unify(skeleton)
    except (ValueError, KeyError, AttributeError, ImportError) as error:
        raise KTError(f"transformers has no language model for {type(model_config).__name__}: {error}") from error
    found = [(_weights(*_host_tensors(module)), top_k) for module, top_k in _find(skeleton).values()]
    shapes = [MoEShape(w.num_experts, w.hidden_size, w.intermediate_size, top_k, r) for w, top_k in found]
    return list(dict.fromkeys(shapes))


def moe_layers(model: nn.Module) -> dict[str, MoEExperts]:
    """The layers that ktmoe runs, by module name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, MoEExperts)}


def unwrapped_layers(model: nn.Module) -> list[str]:
    """Names of routed experts that are not ktmoe's."""
    ours = tuple(f"{name}." for name, m in model.named_modules() if isinstance(m, (MoEExperts, LoraExperts)))
    return [
        name
        for name, m in model.named_modules()
        if looks_like_experts(name, m)
        and not isinstance(m, (MoEExperts, LoraExperts))
        and not name.startswith(ours or ("\0",))
    ]


def summary(model: nn.Module) -> list[str]:
    """What runs where, in a few lines: backend, CPU variant, threads, experts, trainable parameters."""
    layers = list(moe_layers(model).values())
    if not layers:
        return ["ktmoe: no routed experts are attached."]
    first = layers[0]
    where = {"torch": "PyTorch on the CPU", "reference": "the fp32 reference on the CPU"}.get(first.plan.backend)
    if first.plan.is_kernel:
        checked = "NOT verified (kt_verify: off)" if first.config.kt_verify == "off" else "verified on this machine"
        pools = f", {first.plan.tp} NUMA pools" if first.plan.tp > 1 else ""
        where = f"kt_kernel ({kernel.variant()}), {first.plan.threads} threads{pools}, {checked}"
    fallen = [m for m in layers if m.plan.backend != first.plan.backend]
    others_too = f"; {len(fallen)} layers on {fallen[0].plan.backend}" if fallen else ""
    size = sum(m.weights.nbytes() for m in layers) / 1e9
    rest = {p.device.type for n, p in model.named_parameters() if ".experts." not in n}
    expert_ids = {id(p) for m in model.modules() if isinstance(m, (MoEExperts, LoraExperts)) for p in m.parameters()}
    trainable = [p for p in model.parameters() if p.requires_grad]
    of_experts = sum(p.numel() for p in trainable if id(p) in expert_ids)
    others = sum(p.numel() for p in trainable) - of_experts
    return [
        f"ktmoe: routed experts on {first.plan.backend}: {where}{others_too}",
        f"ktmoe: {len(layers)} MoE layers x {first.num_experts} experts, {size:.3g} GB of {first.weights.dtype} "
        f"weights in host memory; everything else on {', '.join(sorted(rest)) or 'cpu'}",
        f"ktmoe: trainable parameters: {of_experts:,} in expert LoRA, {others:,} elsewhere",
    ]


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Puts a module in the place of the one of that name."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _find(model: nn.Module) -> dict[str, tuple[nn.Module, int]]:
    """Every routed-experts module with its top_k. Raises KTError if there is none or one is not plain."""
    if moe_layers(model):
        raise KTError("This model's routed experts are attached already.")
    modules = model.named_modules(remove_duplicate=False)
    found = {name: m for name, m in modules if name and looks_like_experts(name, m)}
    if len(set(map(id, found.values()))) < len(found):
        raise KTError(f"{type(model).__name__}: layers share their experts module; ktmoe takes one per layer.")
    if not found:
        raise KTError(
            f"{type(model).__name__} has no MoE layer: no module of it holds routed experts. use_kt is for "
            "mixture-of-experts models; train this one without it (use_kt: false)."
        )
    problems = {name: why for name, m in found.items() if (why := _why_not_plain(m))}
    if problems:
        name, why = next(iter(problems.items()))
        raise KTError(
            f"{type(found[name]).__name__} ({name}) of {type(model).__name__} does not fit: {why}. ktmoe computes "
            "D(silu(G x) * (U x)) with stacked weights, as transformers 5 holds them."
        )
    return {name: (m, _top_k(model, name)) for name, m in found.items()}


def looks_like_experts(name: str, module: nn.Module) -> bool:
    """Stacked weights [E, ...] of a gated MLP, or a list of expert modules, whatever the class is called."""
    stacked = [p for p in module.parameters(recurse=False) if p.dim() == 3 and p.shape[0] > 1]
    alike = len(stacked) >= 2 and len({p.shape[0] for p in stacked}) == 1  # no position embeddings [1, ...]
    named = bool(stacked) and "Experts" in type(module).__name__
    is_list = isinstance(module, nn.ModuleList) and name.rsplit(".", 1)[-1] == "experts" and len(module) > 1
    return alike or named or is_list


def _why_not_plain(module: Any) -> str:
    """Why ktmoe cannot compute this experts module, or ""."""
    if isinstance(module, nn.ModuleList):
        return (
            "its experts are separate modules (transformers 4, or remote code); transformers 5.2 or later stacks them"
        )
    held = dict(module.named_parameters())
    if getattr(module, "has_bias", False) or any(name.endswith("bias") for name in held):
        return "its experts have biases"
    if not getattr(module, "has_gate", True) or set(held) == {"up_proj", "down_proj"}:
        return "its experts have no gate"
    gate_up, down = held.get("gate_up_proj"), held.get("down_proj")
    if gate_up is None or down is None or len(held) > 2:
        return f"it has parameters {sorted(held)}; expected gate_up_proj and down_proj alone"
    takes = list(inspect.signature(module.forward).parameters)
    if takes != ["hidden_states", "top_k_index", "top_k_weights"]:
        return f"it is called with ({', '.join(takes)}), not (hidden_states, top_k_index, top_k_weights)"
    e, two_i, h = gate_up.shape
    if getattr(module, "is_transposed", False) or tuple(down.shape) != (e, h, two_i // 2):
        return (
            f"gate_up_proj {tuple(gate_up.shape)} and down_proj {tuple(down.shape)} are not [E, 2I, H] and [E, H, I]"
        )
    gate = getattr(type(module), "_apply_gate", None)
    if gate is not None and not gate.__module__.startswith("transformers.integrations"):
        return "it has a gate function of its own"
    x = torch.linspace(-6, 6, 25, device="cpu")
    act = getattr(module, "act_fn", None)
    if act is None or not torch.allclose(act(x), nn.functional.silu(x)):
        return f"its activation is {type(act).__name__}, not silu"
    return ""


def _host_tensors(module: Any) -> tuple[Tensor, Tensor]:
    """gate_up_proj [E, 2I, H] and down_proj [E, H, I] of a plain experts module in host memory (or on meta)."""
    gate_up, down = (t if t.is_meta else t.cpu() for t in (module.gate_up_proj.detach(), module.down_proj.detach()))
    return gate_up, down


def _weights(gate_up: Tensor, down: Tensor) -> ExpertWeights:
    """Views: gate is the first half of gate_up_proj, up the second."""
    i = gate_up.shape[1] // 2
    return ExpertWeights(gate_up[:, :i], gate_up[:, i:], down)


def _check_loaded(name: str, module: Any) -> None:
    if module.gate_up_proj.device.type == "meta":
        raise KTError(f"{name}: its weights are on the meta device. Load the model's weights before attaching it.")


def _top_k(model: Any, name: str) -> int:
    """Experts per token, from the router beside the experts, else from the configuration."""
    parent = model.get_submodule(name.rpartition(".")[0])
    for module in (*parent.children(), parent):
        value = getattr(module, "top_k", None)
        if isinstance(value, int):
            return value
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    for key in ("num_experts_per_tok", "moe_k", "moe_topk"):
        value = getattr(config, key, None)
        if isinstance(value, int):
            return value
    raise KTError(f"{name}: neither its router nor the model's configuration says how many experts a token has.")


_SAVING = ("save_pretrained", "push_to_hub")


def _refuse_saving(model: nn.Module) -> None:
    """Has the model refuse to write itself, and every model inside that has routed experts: they would be left out."""
    for module in model.modules():
        for method in _SAVING:
            if hasattr(module, method) and moe_layers(module):
                setattr(module, method, functools.partial(_refuse_save, f"{type(module).__name__}.{method}"))


def _allow_saving(model: nn.Module) -> None:
    for module in model.modules():
        for method in _SAVING:
            vars(module).pop(method, None)


def _refuse_save(name: str, *args: Any, **kwargs: Any) -> None:
    raise KTError(
        f"{name}: this model's routed experts are not among its parameters, so a checkpoint without experts would be "
        "written. Save the adapter (PeftModel.save_pretrained); the base checkpoint is unchanged."
    )
