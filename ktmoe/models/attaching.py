"""Putting `MoEExperts` in the place of a transformers model's routed experts, and back."""

from __future__ import annotations

import functools
import itertools
from typing import TYPE_CHECKING

from torch import nn
from tqdm.auto import tqdm

from ktmoe.adapters import (
    LoraExperts,
    all_or_nothing,
    get_peft_model,
    unwatch,
    watch,
)
from ktmoe.backends import is_kernel
from ktmoe.checkpoints import Checkpoint
from ktmoe.config import KTConfig
from ktmoe.experts import MoEExperts
from ktmoe.gate import bf16_bytes, distance, settle
from ktmoe.models.attached import allow_saving, moe_layers, refuse_saving
from ktmoe.models.families import Layer, find, put_back
from ktmoe.models.skeleton import check_lora, on_disk
from ktmoe.notices import say_once
from ktmoe.planning import for_processes, plan
from ktmoe.processes import Ranks, Sharing, join
from ktmoe.room import check_room
from ktmoe.split import check_device, left_on_cpu, on_device
from ktmoe.types import ExpertWeights, KTError, MoEShape


if TYPE_CHECKING:
    from peft import LoraConfig


_ATTACHED = itertools.count()  # the same on every process: they run the same program


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
        KTError: no MoE layer, experts that are not plain, sizes that the backend cannot take, or processes
            that do not know of each other yet. It stays as it was.
        KernelError: the kernel failed a check.

    Examples:
        >>> model = transformers.AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.bfloat16)
        >>> config = ktmoe.KTConfig(kt_backend="torch")
        >>> model = ktmoe.attach(model, config, lora=peft.LoraConfig(target_modules=["experts"]))
        >>> model(torch.tensor([[1, 2, 3]])).logits.shape
        torch.Size([1, 3, 64])
    """
    ranks = join()
    config = config or KTConfig()
    replaced: dict[str, MoEExperts] = {}
    found = find(model)
    rank = r if lora is None else check_lora(lora, model, found)
    try:
        tensors = {name: layer.host_tensors() for name, layer in found.items()}
        weights = {name: layer.weights(tensors[name]) for name, layer in found.items()}
        if checkpoint is not None:
            weights = on_disk(model, found, checkpoint)
        config = _settle(config, found, weights, rank or 1, ranks)
        number = next(_ATTACHED)
        for position, (name, layer) in enumerate(found.items()):
            if checkpoint is None and any(t.is_meta for t in tensors[name].values()):
                raise KTError(
                    f"{name}: its weights are on the meta device. Load the model's weights before attaching."
                )
            replaced[name] = MoEExperts(weights[name], top_k=layer.top_k, config=config, layer=name)
            if ranks is not None:
                replaced[name].sharing = Sharing(ranks, f"{number}: {name}", position, replaced[name])
            plan(config, left_on_cpu(config, replaced[name].shape(rank or 1)), weights[name].stored)
        if rank:  # before the model is touched: a kernel that fails its checks leaves it as it was
            load = functools.partial(_load, replaced, rank, streamed=checkpoint is not None)
            if ranks is None:
                load()
            else:
                ranks.agree(load)
                for experts in replaced.values():  # of a process that owns none: it asks for what it has to know
                    experts.load(rank)
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
            refuse_saving(model)
            watch(model)
            return model if lora is None else get_peft_model(model, lora)
    except BaseException:
        for experts in replaced.values():
            experts.close()
        raise


def _settle(
    config: KTConfig, found: dict[str, Layer], weights: dict[str, ExpertWeights], rank: int, ranks: Ranks | None
) -> KTConfig:
    """Decides what is `auto`, once for all layers and processes: by the largest layer. Refuses what does not fit."""
    shapes = [
        MoEShape(w.num_experts, w.hidden_size, w.intermediate_size, found[name].top_k, rank)
        for name, w in weights.items()
    ]
    for name, shape in zip(weights, shapes, strict=True):
        on_device(config, shape, name)
    check_device(config, shapes)
    shapes = [left_on_cpu(config, shape) for shape in shapes]
    formats = {w.stored for w in weights.values()}
    stored = formats.pop() if len(formats) == 1 else ""

    def decide() -> KTConfig:
        largest = max(shapes, key=bf16_bytes)
        decided = settle(config, largest, sum(map(bf16_bytes, shapes)), stored)
        if ranks is not None:
            decided = for_processes(decided, len(ranks.on_host), largest, stored)
        check_room(decided, shapes, stored)
        return decided

    return decide() if ranks is None else ranks.agree(decide)


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
        allow_saving(model)
        unwatch(model)
    return model
