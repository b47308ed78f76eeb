"""Putting `MoEExperts` in the place of a transformers model's routed experts, and back."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn
from tqdm.auto import tqdm

from ktmoe.adapters import (
    LoraExperts,
    all_or_nothing,
    check_lora_config,
    get_peft_model,
    refuse_expert_adapter,
    unwatch,
    watch,
)
from ktmoe.backends import TABLE, is_kernel
from ktmoe.checkpoints import Checkpoint
from ktmoe.config import KTConfig
from ktmoe.experts import MoEExperts
from ktmoe.gate import bf16_bytes, distance, settle
from ktmoe.models.families import Layer, expert_modules, find, names_on_disk, put_back
from ktmoe.notices import say_once
from ktmoe.planning import plan
from ktmoe.processes import check_one_process
from ktmoe.retained import bytes_per_token
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
        model: one whose experts are plain (gated by silu, no bias, applied after the router): any such model of
            transformers 5, and the families of transformers 4 in `ktmoe.models.families`.
        config: which backend, threads, limits.
        lora: if given, the adapter is added too, on the experts and on the rest.
        r: the largest LoRA rank that adapters will have, where `lora` does not say it. With neither, the experts are
            loaded when they are first needed.
        checkpoint: the files that the experts come from, where the model has them without weights.

    Returns:
        The model, or a PeftModel around it if `lora` was given.

    Raises:
        KTError: no MoE layer, experts that are not plain, sizes that the backend cannot take, or a launcher that
            started several processes. It stays as it was.
        KernelError: the kernel failed a check.

    Examples:
        >>> model = transformers.AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.bfloat16)
        >>> config = ktmoe.KTConfig(kt_backend="torch")
        >>> model = ktmoe.attach(model, config, lora=peft.LoraConfig(target_modules=["experts"]))
        >>> model(torch.tensor([[1, 2, 3]])).logits.shape
        torch.Size([1, 3, 64])
    """
    check_one_process()
    config = config or KTConfig()
    replaced: dict[str, MoEExperts] = {}
    found = find(model)
    rank = r if lora is None else _check_lora(lora, model, found)
    try:
        tensors = {name: layer.host_tensors() for name, layer in found.items()}
        weights = {name: layer.weights(tensors[name]) for name, layer in found.items()}
        if checkpoint is not None:
            weights = _on_disk(model, found, checkpoint)
        config = _settle(config, found, weights, rank or 1)
        for name, layer in found.items():
            if checkpoint is None and any(t.is_meta for t in tensors[name].values()):
                raise KTError(
                    f"{name}: its weights are on the meta device. Load the model's weights before attaching."
                )
            replaced[name] = MoEExperts(weights[name], top_k=layer.top_k, config=config)
            plan(config, replaced[name].shape(rank or 1))
        if rank:  # before the model is touched: a kernel that fails its checks leaves it as it was
            _load(replaced, rank, streamed=checkpoint is not None)
    except BaseException:
        for experts in replaced.values():
            experts.close()
        raise
    try:
        with all_or_nothing(model):
            for name, experts in replaced.items():
                layer = found[name]
                if checkpoint is None:
                    for parameter, tensor in tensors[name].items():
                        parameter.data = tensor  # a copy that was on a GPU is freed
                    experts.original = layer.modules
                experts.train(layer.modules[0].training)
                layer.put(experts)
                _mend(layer.block, experts)
            _refuse_saving(model)
            watch(model)
            return model if lora is None else get_peft_model(model, lora)
    except BaseException:
        for experts in replaced.values():
            experts.close()
        raise


def _settle(config: KTConfig, found: dict[str, Layer], weights: dict[str, ExpertWeights], rank: int) -> KTConfig:
    """Decides what is `auto`, once for all layers: by the largest of them."""
    shapes = [
        MoEShape(w.num_experts, w.hidden_size, w.intermediate_size, found[name].top_k, rank)
        for name, w in weights.items()
    ]
    return settle(config, max(shapes, key=bf16_bytes), sum(map(bf16_bytes, shapes)))


def _load(layers: dict[str, MoEExperts], rank: int, streamed: bool) -> None:
    """Loads every layer into its backend, with a bar that shows bytes per second; says how far its format is off."""
    packs = is_kernel(next(iter(layers.values())).plan)
    what = f"{'Packing' if packs else 'Mapping'} experts{' from disk' if streamed else ''}"
    size = sum(experts.weights.nbytes() for experts in layers.values())
    quiet = len(layers) < 8 or not (packs or streamed)
    with tqdm(total=size, desc=what, unit="B", unit_scale=True, disable=quiet) as bar:
        loaded = {}
        for name, experts in layers.items():
            loaded[name] = experts.load(rank)
            bar.update(experts.weights.nbytes())
    if found := distance.sentence(loaded):
        say_once(f"ktmoe: {found}")


def _mend(block: Any, experts: MoEExperts) -> None:
    """DeepSeek-V2's group-limited routing reads an attribute that transformers 5.0 to 5.6 do not set."""
    if type(block).__name__ == "DeepseekV2Moe" and not hasattr(block, "num_experts"):
        block.num_experts = experts.num_experts


def detach(model: nn.Module) -> nn.Module:
    """Gives an attached model transformers' own experts back, in place and on the CPU, and closes the backends.

    Raises:
        KTError: nothing is attached, adapters are still around the experts, or `load_model` made the model. It stays
            as it was.

    Examples:
        >>> model = transformers.AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.bfloat16)
        >>> model = ktmoe.attach(model, ktmoe.KTConfig(kt_backend="torch"))
        >>> ktmoe.detach(model).save_pretrained(new_path)  # with the experts
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
    with all_or_nothing(model):
        for name, experts in layers.items():
            put_back(model, name, experts)
            experts.close()  # loaded again when it is needed, should the rest fail
        _allow_saving(model)
        unwatch(model)
    return model


def check_model(
    model_config: Any, config: KTConfig, r: int, lora: LoraConfig | None = None, *, trust_remote_code: bool = False
) -> None:
    """Refuses, from the configuration alone, a model or an adapter that `attach` would refuse. Nothing is loaded.

    Args:
        model_config: a transformers configuration.
        config: which backend.
        r: LoRA rank, where `lora` does not say it.
        lora: the adapter to come.
        trust_remote_code: whether the model's own code may be run.

    Raises:
        KTError: as `attach`.
    """
    model = skeleton(model_config, trust_remote_code)
    found = find(model)
    for shape in _shapes(found, r if lora is None else _check_lora(lora, model, found)):
        plan(config, shape)


def _check_lora(lora: LoraConfig, model: nn.Module, found: Mapping[str, Layer]) -> int:
    """Refuses an adapter that the model cannot have.

    Returns:
        The largest rank that it gives the experts.
    """
    experts = {name: layer.num_experts for name, layer in found.items()}
    return check_lora_config(lora, model, experts, [h for holders in expert_modules(model).values() for h in holders])


def auto_class(model_config: Any) -> Any:
    """The auto class that makes a configuration's language model: with its vision part, where it has one."""
    seeing = getattr(transformers, "AutoModelForImageTextToText", None)
    seen = seeing is not None and type(model_config) in seeing._model_mapping
    return seeing if seen else transformers.AutoModelForCausalLM


def expert_shapes(model_config: Any, r: int, *, trust_remote_code: bool = False) -> list[MoEShape]:
    """The sizes of a model's MoE layers, each once, from the configuration alone.

    Raises:
        KTError: no MoE layer, experts that are not plain, remote code that does not run here, or a rank that is no
            whole number above zero.
    """
    return _shapes(find(skeleton(model_config, trust_remote_code)), r)


def _shapes(found: Mapping[str, Layer], r: int) -> list[MoEShape]:
    if isinstance(r, bool) or not isinstance(r, int) or r < 1:
        raise KTError(f"lora_rank: got {r!r}; expected a whole number of at least 1.")
    return list(dict.fromkeys(replace(layer.shape(), rank=r) for layer in found.values()))


def experts_in(model: nn.Module, checkpoint: Checkpoint) -> dict[str, ExpertWeights]:
    """The routed experts in a checkpoint, by the name that their module has in the model. Nothing is loaded.

    Args:
        model: from `skeleton`.
        checkpoint: its files.

    Raises:
        KTError: as `attach`; or matrices that are missing, there twice, or of another shape.
    """
    return _on_disk(model, find(model), checkpoint)


def _on_disk(model: nn.Module, found: Mapping[str, Layer], checkpoint: Checkpoint) -> dict[str, ExpertWeights]:
    shapes = {name: layer.shape() for name, layer in found.items()}
    sizes = {name: (s.num_experts, s.intermediate_size, s.hidden_size) for name, s in shapes.items()}
    return checkpoint.experts(sizes, names_on_disk(model, found))


def skeleton(model_config: Any, trust_remote_code: bool = False) -> nn.Module:
    """The model without weights.

    Raises:
        KTError: transformers has no such model, or its remote code does not run here.
    """
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made: nn.Module = auto_class(model_config).from_config(model_config, trust_remote_code=trust_remote_code)
            return made
    except (ValueError, KeyError, AttributeError, ImportError, TypeError) as error:
        if trust_remote_code:
            raise KTError(
                f"trust_remote_code: the remote code of {type(model_config).__name__} does not run with transformers "
                f"{transformers.__version__} ({error}). Use a release that it was written for (DeepSeek's: 4.40 to "
                "4.53), or one that has the model itself. Kimi-K2 is DeepSeek-V3 to transformers: write model_type: "
                "deepseek_v3 into its config.json."
            ) from error
        raise KTError(f"transformers has no language model for {type(model_config).__name__}: {error}") from error


def moe_layers(model: nn.Module) -> dict[str, MoEExperts]:
    """The layers that ktmoe runs, by module name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, MoEExperts)}


def unwrapped_layers(model: nn.Module) -> list[str]:
    """Names of routed experts that are not ktmoe's."""
    ours = tuple(f"{name}." for name, m in model.named_modules() if isinstance(m, (MoEExperts, LoraExperts)))
    return [
        name
        for name, holders in expert_modules(model).items()
        if not isinstance(model.get_submodule(holders[0]), (MoEExperts, LoraExperts))
        and not name.startswith(ours or ("\0",))
    ]


def summary(model: nn.Module) -> list[str]:
    """What runs where, in a few lines: backend, CPU variant, threads, experts, trainable parameters."""
    layers = list(moe_layers(model).values())
    if not layers:
        return ["ktmoe: no routed experts are attached."]
    first = layers[0]
    where = TABLE[first.plan.backend].describe()
    if is_kernel(first.plan):
        checked = "NOT verified (kt_verify: off)" if first.config.kt_verify == "off" else "verified on this machine"
        pools = f", {first.plan.tp} NUMA pools" if first.plan.tp > 1 else ""
        threads = f"{first.plan.threads} thread{'s' if first.plan.threads != 1 else ''}{pools}"
        copies = "shared by all layers" if first.plan.share_backward else "of each layer's own"
        where += f", {threads}, backward weights {copies}, {checked}"
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
        _activation(layers, 4 * of_experts),
    ]


def _activation(layers: list[MoEExperts], lora_bytes: int) -> str:
    """What is kept for gradient checkpointing, and how much memory it takes."""
    mode = layers[0].config.kt_cpu_activation
    if mode == "recompute":
        return "ktmoe: kt_cpu_activation: recompute: gradient checkpointing runs the experts' forward twice"
    dtype = torch.float32 if layers[0].plan.backend == "reference" else torch.bfloat16
    per_token = sum(bytes_per_token(m.shape(1), dtype) for m in layers) / 1e3
    limit = "" if mode == "retain" else " while a tenth of the memory is free"
    return (
        f"ktmoe: kt_cpu_activation: {mode}: gradient checkpointing does not run the experts' forward twice{limit}: "
        f"their inputs and outputs are kept ({per_token:,.0f} kB for each token of a batch, all layers together), and "
        f"a copy of their LoRA ({lora_bytes / 1e6:,.0f} MB)"
    )


_SAVING = ("save_pretrained", "push_to_hub")
_LOADING = "load_adapter"


def _refuse_saving(model: nn.Module) -> None:
    """Has the model refuse what would leave its routed experts out: to write itself, or to load an adapter of theirs.

    Every model inside that has routed experts does the same.
    """
    for module in model.modules():
        if not moe_layers(module):
            continue
        for method in _SAVING:
            if hasattr(module, method):
                setattr(module, method, functools.partial(_refuse_save, f"{type(module).__name__}.{method}"))
        if load := getattr(type(module), _LOADING, None):
            setattr(module, _LOADING, functools.partial(refuse_expert_adapter, module, load))


def _allow_saving(model: nn.Module) -> None:
    for module in model.modules():
        for method in (*_SAVING, _LOADING):
            vars(module).pop(method, None)


def _refuse_save(name: str, *args: Any, **kwargs: Any) -> None:
    raise KTError(
        f"{name}: this model's routed experts are not among its parameters, so a checkpoint without experts would be "
        "written. Save the adapter (PeftModel.save_pretrained); `ktmoe merge` writes a checkpoint with it merged in. "
        "A model that was in memory when it was attached saves after ktmoe.detach."
    )
