"""PeftModel and LoraModel of a model whose expert LoRA is stacked in memory: peft's own methods, whole or refused."""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
from peft import LoraConfig, PeftConfig, PeftModel, PeftType
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ktmoe.adapters.config import PREFIX
from ktmoe.adapters.fused import ExpertLora
from ktmoe.adapters.guard import our_own, watch
from ktmoe.adapters.layer import LoraExperts
from ktmoe.adapters.loading import config_of, expert_layers, fill, plain_names, read
from ktmoe.adapters.options import hub_options, known, refuse_unsupported
from ktmoe.adapters.rollback import all_or_nothing
from ktmoe.adapters.targets import layout_of, prepare_config
from ktmoe.adapters.writing import staged, write_experts
from ktmoe.experts import MoEExperts
from ktmoe.types import KTError


def inject(model: nn.Module, config: PeftConfig, adapter_name: str, **options: Any) -> PeftModel:
    """`peft.get_peft_model`, of any method of peft's. All or nothing.

    Raises:
        KTError: the model has adapters, or peft refuses the configuration.
    """
    if isinstance(model, PeftModel) or any(isinstance(m, BaseTunerLayer) for m in model.modules()):
        raise KTError(
            "model: it has adapters already, whose numbers could be lost. Add another by its own `add_adapter` or "
            "`load_adapter`, or take them off first: `model = peft_model.unload()`."
        )
    try:
        with all_or_nothing(model), our_own():
            peft_model = peft.get_peft_model(model, config, adapter_name=adapter_name, **options)
            watch(model)
            give_class(peft_model)
    except KTError:
        raise
    except ValueError as error:
        raise KTError(f"peft_config: {error}") from error
    return peft_model


def give_class(peft_model: Any) -> None:
    """Gives a PeftModel with LoRA ktmoe's methods."""
    if peft_model.peft_type != PeftType.LORA:
        return
    for made, mixin in ((peft_model, _KTPeftMixin), (peft_model.base_model, _KTLoraMixin)):
        if not isinstance(made, mixin):
            stock: Any = type(made)
            made.__class__ = ktmoe_class(stock)


@functools.cache
def ktmoe_class(cls: Any) -> Any:
    """A class of peft's with ktmoe's methods before its own."""
    mixin = _KTLoraMixin if issubclass(cls, LoraModel) else _KTPeftMixin
    return type(cls.__name__, (mixin, cls), {"__doc__": cls.__doc__, "__module__": __name__})


def _remade(stock: Any) -> Any:
    cls = ktmoe_class(stock)
    return cls.__new__(cls)


class _Pickled:
    """Classes that are made when they are needed are none that pickle finds by name."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """For pickle, torch.save and copy."""
        return _remade, (type(self).__bases__[1],), dict(vars(self))


class _KTPeftMixin(_Pickled):
    """Save and load of a PeftModel whose expert LoRA is stacked in memory."""

    @property
    def _ddp_params_and_buffers_to_ignore(self: Any) -> list[str]:
        """Read by DistributedDataParallel, which takes parameters on one kind of device only, and wants some to train.

        Expert LoRA stays on the CPU; `ktmoe.processes` averages it.
        """
        own = {f"{name}.{p}" for name, layer in expert_layers(self) for p, _ in layer.named_parameters()}
        others_train = any(p.requires_grad for n, p in self.named_parameters() if n not in own)
        return sorted(own) if others_train else []

    def save_pretrained(
        self: Any,
        save_directory: str,
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
        **kwargs: Any,
    ) -> None:
        """`PeftModel.save_pretrained`; expert LoRA goes to the same file, as stock peft reads it. All or nothing."""
        if not safe_serialization:
            raise KTError("safe_serialization: got False; adapters are saved as safetensors only. Leave it at True.")
        if os.path.isfile(save_directory):
            raise KTError(f"save_directory: {save_directory} is a file; expected a directory.")
        unknown = [n for n in selected_adapters or () if n not in self.peft_config]
        if unknown:
            raise KTError(f"selected_adapters: got {unknown[0]!r}; this model has {', '.join(self.peft_config)}.")
        state = kwargs.get("state_dict")
        state = self.state_dict() if state is None else state
        prefixes = tuple(f"{name}." for name, _ in expert_layers(self))
        if prefixes:
            kwargs["state_dict"] = {k: v for k, v in state.items() if not k.startswith(prefixes)}
        if path_initial_model_for_weight_conversion is not None:
            if prefixes:
                raise KTError(
                    "path_initial_model_for_weight_conversion: given for LoRA on routed experts, which starts plain: "
                    "there is nothing to convert. Leave it out."
                )
            kwargs["path_initial_model_for_weight_conversion"] = path_initial_model_for_weight_conversion
        kwargs |= {"save_embedding_layers": save_embedding_layers, "is_main_process": is_main_process}
        if not is_main_process:
            super().save_pretrained(save_directory, True, selected_adapters, **kwargs)  # type: ignore[misc]
            return
        layout, names = layout_of(self), plain_names(self)
        with all_or_nothing(self), staged(Path(save_directory)) as part:
            super().save_pretrained(str(part), True, selected_adapters, **kwargs)  # type: ignore[misc]
            for adapter in self.peft_config if selected_adapters is None else selected_adapters:
                experts = {
                    name.removeprefix(PREFIX): _saved(name, layer, adapter, state)
                    for name, layer in expert_layers(self)
                    if adapter in layer.lora_A
                }
                write_experts(part / ("" if adapter == "default" else adapter), experts, layout, names)
                if experts and layout.unreadable:
                    warnings.warn(f"ktmoe: {layout.unreadable}", stacklevel=2)

    def load_adapter(
        self: Any,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """`PeftModel.load_adapter`, of every format that `ktmoe.load_adapter` reads. All or nothing.

        Other adapters stay frozen or trainable as they were, and the new one becomes what `is_trainable` says; stock
        peft 0.20 thaws the active one instead. Under the name of an adapter that is there, its numbers are replaced.
        """
        refuse_unsupported(
            ephemeral_gpu_offload=ephemeral_gpu_offload, low_cpu_mem_usage=low_cpu_mem_usage, key_mapping=key_mapping
        )
        hub = hub_options("load_adapter", kwargs)
        adapter = read(self, str(model_id), None, hub)
        with all_or_nothing(self), our_own():
            if adapter_name not in self.peft_config:
                config = config_of(adapter, self.get_base_model(), is_trainable)
                self._check_new_adapter_config(config, is_trainable=is_trainable)
                with _others_unchanged(self, config):
                    options = known(super().add_adapter, autocast_adapter_dtype=autocast_adapter_dtype)  # type: ignore[misc]
                    super().add_adapter(adapter_name, config, **options)  # type: ignore[misc]
                _set_requires_grad(self, adapter_name, is_trainable)
            if not is_trainable:
                self.eval()
            return fill(self, adapter, adapter_name)  # last: what it overwrites comes back only if it fails itself

    def add_adapter(
        self: Any,
        adapter_name: str,
        peft_config: LoraConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """`PeftModel.add_adapter`, for the routed experts too. Other adapters stay frozen or not, as they were."""
        refuse_unsupported(low_cpu_mem_usage=low_cpu_mem_usage)
        if adapter_name in self.peft_config:
            raise KTError(
                f"adapter_name: {adapter_name!r} is there already, and its numbers would be lost. Name another, or "
                "call `delete_adapter` first."
            )
        if peft_config.peft_type != self.peft_type:
            raise KTError(
                f"peft_config: got {peft_config.peft_type.value} for a model with {self.peft_type.value} adapters; "
                "peft cannot combine them."
            )
        with all_or_nothing(self), our_own():
            config = prepare_config(peft_config, self.get_base_model())
            with _others_unchanged(self, config):
                options = known(super().add_adapter, autocast_adapter_dtype=autocast_adapter_dtype)  # type: ignore[misc]
                super().add_adapter(adapter_name, config, **options)  # type: ignore[misc]

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Trainable parameters and all, the frozen routed experts included, which are no parameters here."""
        trainable, total = super().get_nb_trainable_parameters()  # type: ignore[misc]
        for experts in (m for m in self.modules() if isinstance(m, MoEExperts)):  # type: ignore[attr-defined]
            total += 3 * experts.num_experts * experts.hidden_size * experts.weights.intermediate_size
        return trainable, total


class _KTLoraMixin(_Pickled):
    """Merging of a LoraModel whose expert LoRA is stacked in memory; PeftModel hands these calls on to it."""

    def merge_adapter(self: Any, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """`LoraModel.merge_adapter`; see `LoraExperts.merge` for what it does to routed experts. All or nothing."""
        self._check_merge(adapter_names, safe_merge)
        with _unmerged_on_failure(self):
            super().merge_adapter(adapter_names, **known(super().merge_adapter, safe_merge=safe_merge))  # type: ignore[misc]

    def merge_and_unload(
        self: Any, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """`LoraModel.merge_and_unload`: the model without adapters, its routed experts still run by ktmoe."""
        self._check_merge(adapter_names, safe_merge)
        with _unmerged_on_failure(self):
            merged: nn.Module = super().merge_and_unload(progressbar, safe_merge, adapter_names)  # type: ignore[misc]
        return merged

    def unload(self: Any) -> nn.Module:
        """`LoraModel.unload`. All or nothing."""
        with all_or_nothing(self):
            bare: nn.Module = super().unload()  # type: ignore[misc]
        return bare

    def _check_merge(self: Any, adapter_names: list[str] | None, safe_merge: bool) -> None:
        """Before any module is touched, since peft merges module by module."""
        unknown = [n for n in adapter_names or () if n not in self.peft_config]
        if unknown:
            raise KTError(f"adapter_names: got {unknown[0]!r}; this model has {', '.join(self.peft_config)}.")
        for name, layer in expert_layers(self) if safe_merge else ():
            layer.check_merge(adapter_names, name)

    def add_weighted_adapter(
        self: Any,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
    ) -> None:
        """`LoraModel.add_weighted_adapter`; refused where one of the adapters is on routed experts."""
        if any(a in layer.lora_A for a in adapters for _, layer in expert_layers(self)):
            raise KTError(
                f"add_weighted_adapter: got {', '.join(adapters)}, with LoRA on routed experts; combining that is not "
                "built. `model.base_model.set_adapter([...])` runs several at once: they add up."
            )
        with all_or_nothing(self), our_own():
            super().add_weighted_adapter(  # type: ignore[misc]
                adapters, weights, adapter_name, combination_type, svd_rank, svd_clamp, svd_full_matrices, svd_driver,
                density, majority_sign_method,
            )  # fmt: skip


@contextlib.contextmanager
def _others_unchanged(model: nn.Module, config: Any) -> Iterator[None]:
    """Parameters that are there keep their `requires_grad`, which peft sets anew with every adapter that it adds."""
    before = [(p, p.requires_grad) for p in model.parameters()]
    biases = getattr(config, "bias", "none") != "none" and not config.inference_mode
    yield
    thawed = {id(p) for n, p in model.named_parameters() if biases and "bias" in n}
    for parameter, requires_grad in before:
        if id(parameter) not in thawed:
            parameter.requires_grad_(requires_grad)


def _set_requires_grad(model: Any, adapter_name: str, requires_grad: bool) -> None:
    if hasattr(type(model), "set_requires_grad"):
        model.set_requires_grad(adapter_name, requires_grad)
        return
    for name, parameter in model.named_parameters():  # peft before 0.18
        if adapter_name in name.split("."):
            parameter.requires_grad_(requires_grad)


@contextlib.contextmanager
def _unmerged_on_failure(model: nn.Module) -> Iterator[None]:
    """Takes out again what has been merged when a merge fails: exactly, or up to rounding, as `unmerge_adapter`."""
    before = [(m, list(m.merged_adapters)) for m in model.modules() if isinstance(m, BaseTunerLayer)]
    with all_or_nothing(model):
        try:
            yield
        except BaseException:
            for layer, merged in before:
                if layer.merged_adapters != merged:
                    layer.unmerge()
                    if merged:
                        layer.merge(adapter_names=merged)
            raise


def _saved(name: str, layer: LoraExperts, adapter: str, state: dict[str, Tensor]) -> ExpertLora:
    """One layer's LoRA out of a state dict, on the CPU."""
    tensors = {}
    for key in layer.stacked(adapter):
        projection, side = key.split(".")
        tensors[key] = state[f"{name}.{side}.{adapter}.{projection}"].detach().cpu()
    return ExpertLora(tensors, layer.r[adapter], layer.saved_scaling(adapter))
