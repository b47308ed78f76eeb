"""PeftModels whose expert LoRA is stacked in memory: made, loaded, saved, merged.

The files are `ktmoe.adapter_files`'; which modules get LoRA is decided in `ktmoe.adapter_targets`.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import os
import unittest.mock
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import torch
from peft import LoraConfig, PeftModel, set_peft_model_state_dict
from torch import Tensor, nn

from ktmoe.adapters.config import PREFIX, patterns, short_names
from ktmoe.adapters.files import HUB, Adapter, read_adapter, write_experts
from ktmoe.adapters.fused import ExpertLora
from ktmoe.adapters.layer import LoraExperts
from ktmoe.adapters.targets import (
    EXPERTS_TARGET,
    check_lora_config,
    layout_of,
    prepare_config,
    routers,
    with_experts_layer,
)
from ktmoe.experts import MoEExperts
from ktmoe.types import KTError


__all__ = ["EXPERTS_TARGET", "check_lora_config", "get_peft_model", "load_adapter", "prepare_config", "routers"]


def get_peft_model(
    model: nn.Module, peft_config: LoraConfig, adapter_name: str = "default", **kwargs: Any
) -> PeftModel:
    """`peft.get_peft_model` for a model whose routed experts ktmoe runs.

    Args:
        model: attached (`ktmoe.attach`).
        peft_config: `target_modules` reaches the routed experts by the name "experts", by gate_proj, up_proj and
            down_proj together (w1, w3, w2), by "all-linear", or by a regular expression that matches them.
        adapter_name: of the new adapter.
        **kwargs: for peft.

    Returns:
        A PeftModel that saves and loads expert LoRA as stock peft reads it.

    Raises:
        KTError: a LoRA variant that the experts do not have.

    Examples:
        >>> model = ktmoe.load_model(model_path, ktmoe.KTConfig(kt_backend="torch"), r=8)
        >>> model = ktmoe.get_peft_model(model, peft.LoraConfig(r=8, target_modules="all-linear"))
        >>> model.active_adapters
        ['default']
    """
    _refuse_options(kwargs)
    return _inject(model, prepare_config(peft_config, model), adapter_name, **kwargs)


def load_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    is_trainable: bool = False,
    adapter_name: str = "default",
    **hub: Any,
) -> PeftModel:
    """`PeftModel.from_pretrained` for a model whose routed experts ktmoe runs.

    Reads what ktmoe saved, per-expert adapters of stock peft, and its adapters of stacked parameters
    (`target_parameters`), where gate and up may share one A: each then keeps it, at its full rank.

    Args:
        model: attached, without adapters.
        path: a directory, or a name on the hub.
        is_trainable: whether to go on training it.
        adapter_name: the name to load it under.
        **hub: `subfolder`, `revision`, `token` ... as peft takes them.

    Returns:
        The PeftModel with the adapter active.

    Raises:
        KTError: files whose keys are incomplete, of a wrong shape, or not for this model, which stays as it was.

    Examples:
        >>> model = ktmoe.load_model(model_path, ktmoe.KTConfig(kt_backend="torch"), r=8)
        >>> model = ktmoe.load_adapter(model, adapter_path)
        >>> model(torch.tensor([[1, 2, 3]])).logits.shape
        torch.Size([1, 3, 64])
    """
    adapter = _read(model, path, hub)
    peft_model = _inject(model, _config_of(adapter, model, is_trainable), adapter_name)
    try:
        _fill(peft_model, adapter, adapter_name, is_trainable)
    except Exception:
        peft_model.base_model.unload()
        raise
    return peft_model


class _KTPeftMixin:
    """Save, load and merge of a PeftModel whose expert LoRA is stacked in memory."""

    def save_pretrained(
        self: Any,
        save_directory: str,
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """`PeftModel.save_pretrained`; expert LoRA goes to the same file, as stock peft reads it."""
        if not safe_serialization:
            raise KTError("safe_serialization: got False; adapters are saved as safetensors only. Leave it at True.")
        state = kwargs.pop("state_dict", None)
        state = self.state_dict() if state is None else state
        prefixes = tuple(f"{name}." for name, _ in _expert_layers(self))
        kwargs["state_dict"] = {k: v for k, v in state.items() if not k.startswith(prefixes)} if prefixes else state
        super().save_pretrained(save_directory, True, selected_adapters, **kwargs)  # type: ignore[misc]
        if not kwargs.get("is_main_process", True):
            return
        layout, names = layout_of(self), _plain_names(self)
        for adapter in selected_adapters or list(self.peft_config):
            folder = Path(save_directory) / ("" if adapter == "default" else adapter)
            experts = {
                name.removeprefix(PREFIX): _saved(name, layer, adapter, state)
                for name, layer in _expert_layers(self)
                if adapter in layer.lora_A
            }
            write_experts(folder, experts, layout, names)
            if experts and layout.unreadable:
                warnings.warn(f"ktmoe: {layout.unreadable}", stacklevel=2)

    def load_adapter(self: Any, model_id: str, adapter_name: str, is_trainable: bool = False, **kwargs: Any) -> Any:
        """`PeftModel.load_adapter`, of every format that `ktmoe.load_adapter` reads."""
        _refuse_options(kwargs)
        adapter = _read(self, model_id, kwargs)
        new = adapter_name not in self.peft_config
        if new:
            with _native_names():
                config = _config_of(adapter, self.get_base_model(), is_trainable)
                super().add_adapter(adapter_name, config)  # type: ignore[misc]
        try:
            return _fill(self, adapter, adapter_name, is_trainable)
        except Exception:
            if new:  # an adapter that did not load must not stay behind half made
                self.delete_adapter(adapter_name)
            raise

    def add_adapter(self: Any, adapter_name: str, peft_config: LoraConfig, **kwargs: Any) -> None:
        """`PeftModel.add_adapter`, for the routed experts too."""
        _refuse_options(kwargs)
        with _native_names():
            prepared = prepare_config(peft_config, self.get_base_model())
            super().add_adapter(adapter_name, prepared, **kwargs)  # type: ignore[misc]

    def merge_adapter(self: Any, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """`PeftModel.merge_adapter`; see `LoraExperts.merge` for what it does to routed experts."""
        self._check_merge(adapter_names, safe_merge)
        options = {"safe_merge": True} if safe_merge else {}  # peft before 0.17 has no such argument
        self.base_model.merge_adapter(adapter_names=adapter_names, **options)

    def merge_and_unload(
        self: Any, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """`PeftModel.merge_and_unload`: the model without adapters, its routed experts still run by ktmoe."""
        self._check_merge(adapter_names, safe_merge)
        return self.base_model.merge_and_unload(progressbar, safe_merge, adapter_names)

    def _check_merge(self: Any, adapter_names: list[str] | None, safe_merge: bool) -> None:
        """Before any module is touched, since peft merges module by module."""
        unknown = [n for n in adapter_names or () if n not in self.peft_config]
        if unknown:
            raise KTError(f"adapter_names: got {unknown[0]!r}; this model has {', '.join(self.peft_config)}.")
        for name, layer in _expert_layers(self) if safe_merge else ():
            layer.check_merge(adapter_names, name)

    def add_weighted_adapter(self: Any, adapters: list[str], *args: Any, **kwargs: Any) -> None:
        """`LoraModel.add_weighted_adapter`; refused where one of the adapters is on routed experts."""
        if any(a in layer.lora_A for a in adapters for _, layer in _expert_layers(self)):
            raise KTError(
                f"add_weighted_adapter: got {', '.join(adapters)}, with LoRA on routed experts; combining that is not "
                "built. `model.base_model.set_adapter([...])` runs several at once: they add up."
            )
        self.base_model.add_weighted_adapter(adapters, *args, **kwargs)

    def get_nb_trainable_parameters(self: Any) -> tuple[int, int]:
        """Trainable parameters and all, the frozen routed experts included, which are no parameters here."""
        trainable, total = super().get_nb_trainable_parameters()  # type: ignore[misc]
        for experts in (m for m in self.modules() if isinstance(m, MoEExperts)):
            total += 3 * experts.num_experts * experts.hidden_size * experts.weights.intermediate_size
        return trainable, total


def _inject(model: nn.Module, config: LoraConfig, adapter_name: str, **kwargs: Any) -> PeftModel:
    with _native_names():
        peft_model = peft.get_peft_model(model, config, adapter_name=adapter_name, **kwargs)
    if not isinstance(peft_model, _KTPeftMixin):
        stock: Any = type(peft_model)
        peft_model.__class__ = _ktmoe_class(stock)
    return peft_model


@functools.cache
def _ktmoe_class(cls: Any) -> Any:
    return type(cls.__name__, (_KTPeftMixin, cls), {"__doc__": cls.__doc__, "__module__": __name__})


def _read(model: Any, path: str | os.PathLike[str], options: dict[str, Any]) -> Adapter:
    """An adapter from disk that fits a model, with adapters or without. Nothing is changed."""
    experts = {n.removesuffix(".base_layer"): m for n, m in model.named_modules() if isinstance(m, MoEExperts)}
    shapes = {n.removeprefix(PREFIX): m.shape(1) for n, m in experts.items()}
    hub = {k: v for k, v in options.items() if k in HUB}
    adapter = read_adapter(str(path), shapes, layout_of(model), **hub)
    names = {n.removeprefix(PREFIX) for n in _plain_names(model)}
    foreign = sorted(set(adapter.modules) - names)
    if foreign:
        raise KTError(
            f"{path}: the adapter does not fit this model, which has no module of the name {foreign[0]} "
            f"({len(foreign)} such). Was it trained on another model?"
        )
    return adapter


def _config_of(adapter: Adapter, model: nn.Module, is_trainable: bool) -> LoraConfig:
    """The configuration that injects exactly the modules that an adapter's file has.

    On disk gate_proj names the routed experts and any dense MLP alike; the keys say which of them were trained.
    """
    config = copy.deepcopy(adapter.config)
    config.inference_mode = not is_trainable
    modules = dict(adapter.modules)
    linear = {n for n, m in model.named_modules() if n in modules and _has_layer(m)}
    ranks: dict[str, float] = {n: m.rank for n, m in modules.items()}
    alphas = {n: m.alpha for n, m in modules.items()}
    for name, lora in adapter.experts.items():
        ranks[name] = lora.rank
        alphas[name] = lora.scaling * (math.sqrt(lora.rank) if config.use_rslora else lora.rank)
    config.target_modules = short_names(linear | set(adapter.experts), _plain_names(model))
    named = {n if n in linear or n in adapter.experts else f"{n}.weight": n for n in ranks}
    config.rank_pattern = patterns({key: ranks[n] for key, n in named.items()}, config.r)
    config.alpha_pattern = patterns({key: alphas[n] for key, n in named.items()}, config.lora_alpha)
    if hasattr(config, "target_parameters"):  # what is no layer of peft's, such as a router: by its weight
        config.target_parameters = sorted(f"{n}.weight" for n in set(modules) - linear) or None
    config.layers_to_transform = config.layers_pattern = None
    if getattr(config, "exclude_modules", None):
        config.exclude_modules = None
    return with_experts_layer(config)


def _has_layer(module: nn.Module) -> bool:
    """Whether peft has a LoRA layer for it as a module."""
    return isinstance(module, (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)) or (
        hasattr(module, "base_layer") and not hasattr(module, "parameter_name")
    )


def _fill(model: Any, adapter: Adapter, adapter_name: str, is_trainable: bool) -> Any:
    """Copies an adapter's tensors into a PeftModel that has its modules. All or nothing."""
    layers = {n: m for n, m in _expert_layers(model) if m.stacked(adapter_name)}
    named = {n.removeprefix(PREFIX): m for n, m in layers.items()}
    if set(named) != set(adapter.experts) or any(
        named[n].r[adapter_name] != e.rank for n, e in adapter.experts.items()
    ):
        raise KTError(
            f"{adapter.source}: adapter {adapter_name!r} of this model has LoRA on {len(named)} layers of routed "
            f"experts, the file on {len(adapter.experts)}, or of another rank. Load it under a new name."
        )
    own = model.state_dict()
    for key, tensor in adapter.rest.items():
        head, lora, tail = key.partition(".lora_")
        side, dot, rest = tail.partition(".")
        there = own.get(f"{head}{lora}{side}.{adapter_name}{dot}{rest}") if lora else None
        if there is not None and there.shape != tensor.shape:
            raise KTError(f"{adapter.source}: {key} is {tuple(tensor.shape)}, expected {tuple(there.shape)}.")
    with _native_names():
        result = set_peft_model_state_dict(model, adapter.rest, adapter_name=adapter_name)
    prefixes = tuple(f"{name}." for name in layers)
    missing = [k for k in result.missing_keys if "lora_" in k and f".{adapter_name}." in k]
    missing = [k for k in missing if not k.startswith(prefixes or ("\0",))]
    if result.unexpected_keys or missing:
        raise KTError(
            f"{adapter.source}: the adapter does not fit this model. Missing: {missing[:5] or 'none'}; not expected: "
            f"{result.unexpected_keys[:5] or 'none'}."
        )
    with torch.no_grad():
        for name, layer in named.items():
            for key, parameter in layer.stacked(adapter_name).items():
                parameter.copy_(adapter.experts[name].tensors[key])
    result.missing_keys[:] = missing
    if not is_trainable:
        model.eval()
    return result


def _saved(name: str, layer: LoraExperts, adapter: str, state: dict[str, Tensor]) -> ExpertLora:
    """One layer's LoRA out of a state dict, on the CPU."""
    tensors = {}
    for key in layer.stacked(adapter):
        projection, side = key.split(".")
        tensors[key] = state[f"{name}.{side}.{adapter}.{projection}"].detach().cpu()
    return ExpertLora(tensors, layer.r[adapter], layer.scaling[adapter])


def _refuse_options(options: dict[str, Any]) -> None:
    """Refuses peft's options that would leave the experts' LoRA unloaded without a word."""
    for name in ("low_cpu_mem_usage", "ephemeral_gpu_offload", "key_mapping", "ignore_mismatched_sizes"):
        if options.get(name):
            raise KTError(f"{name}: got {options[name]!r}; not supported with routed experts. Leave it out.")


@contextlib.contextmanager
def _native_names() -> Iterator[None]:
    """Keeps peft (0.19 on) from renaming expert targets and keys to transformers 5's fused parameters.

    They are right for a stock model; in an attached one the fused parameters do not exist.
    """
    try:
        from peft.utils import transformers_weight_conversion as conversion
    except ImportError:  # before 0.19, or transformers 4
        yield
        return
    keep = unittest.mock.patch.object
    with contextlib.ExitStack() as stack:
        stack.enter_context(keep(conversion, "convert_peft_config_for_transformers", lambda *a, **k: None))
        name = "convert_peft_adapter_state_dict_for_transformers"
        if hasattr(conversion, name):
            same = lambda model, peft_config, adapter_state_dict, *a, **k: adapter_state_dict  # noqa: E731
            stack.enter_context(keep(conversion, name, same))
        yield


def _expert_layers(model: nn.Module) -> list[tuple[str, LoraExperts]]:
    return [(name, m) for name, m in model.named_modules() if isinstance(m, LoraExperts)]


def _plain_names(model: nn.Module) -> set[str]:
    """Names of a model's own modules, as they were before peft put its layers around some of them."""
    return {
        n.removeprefix(PREFIX).replace(".base_layer", "")
        for n, _ in model.named_modules()
        if ".lora_" not in n and n not in ("", "base_model", "base_model.model")
    }
