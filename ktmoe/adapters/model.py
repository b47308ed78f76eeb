"""`get_peft_model` and `load_adapter`: peft's own functions, for models whose routed experts ktmoe runs."""

from __future__ import annotations

import os
from typing import Any

import peft
from peft import LoraConfig, PeftConfig, PeftModel, PeftType
from torch import nn

from ktmoe.adapters.files import has_experts, read_config
from ktmoe.adapters.guard import check_other_method, our_own, watch
from ktmoe.adapters.loading import config_of, fill, read
from ktmoe.adapters.options import hub_options, refuse_unsupported
from ktmoe.adapters.peft_model import give_class, inject
from ktmoe.adapters.rollback import all_or_nothing
from ktmoe.adapters.targets import prepare_config
from ktmoe.types import KTError


def get_peft_model(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """`peft.get_peft_model` for a model whose routed experts ktmoe runs. All or nothing.

    Args:
        model: attached (`ktmoe.attach`).
        peft_config: LoRA, whose `target_modules` reaches the routed experts by the name "experts", by gate_proj,
            up_proj and down_proj together (w1, w3, w2), by "all-linear", or by a regular expression that matches
            them. Any other method of peft's that leaves them alone.
        adapter_name: of the new adapter.
        mixed: refused, as is `low_cpu_mem_usage`.
        autocast_adapter_dtype: as peft takes it; expert LoRA is float32 in any case.
        revision: of the base model, for the adapter's configuration.
        low_cpu_mem_usage: refused.

    Returns:
        A PeftModel that saves and loads expert LoRA as stock peft reads it.

    Raises:
        KTError: a LoRA variant that the experts do not have, or another method that reaches them.

    Examples:
        >>> model = ktmoe.load_model(model_path, ktmoe.KTConfig(kt_backend="torch"), r=8)
        >>> model = ktmoe.get_peft_model(model, peft.LoraConfig(r=8, target_modules="all-linear"))
        >>> model.active_adapters
        ['default']
    """
    refuse_unsupported(mixed=mixed, low_cpu_mem_usage=low_cpu_mem_usage)
    options = {"autocast_adapter_dtype": autocast_adapter_dtype, "revision": revision}
    if not isinstance(peft_config, PeftConfig):
        raise KTError(f"peft_config: got {type(peft_config).__name__}; expected a configuration of peft's.")
    if peft_config.peft_type == PeftType.LORA and isinstance(peft_config, LoraConfig):
        return inject(model, prepare_config(peft_config, model), adapter_name, **options)
    check_other_method(peft_config, model)
    return inject(model, peft_config, adapter_name, **options)


def load_adapter(
    model: nn.Module,
    model_id: str | os.PathLike[str],
    adapter_name: str = "default",
    is_trainable: bool = False,
    config: PeftConfig | None = None,
    autocast_adapter_dtype: bool = True,
    ephemeral_gpu_offload: bool = False,
    low_cpu_mem_usage: bool = False,
    key_mapping: dict[str, str] | None = None,
    **kwargs: Any,
) -> PeftModel:
    """`PeftModel.from_pretrained` for a model whose routed experts ktmoe runs, with its arguments. All or nothing.

    Reads what ktmoe saved, per-expert adapters of stock peft, its adapters of stacked parameters
    (`target_parameters`), where gate and up may share one A: each then keeps it, at its full rank, and the forked
    training stack's `fused_expert_lora.safetensors`. Adapters of other methods, where they leave the experts alone.

    It has the arguments of `PeftModel.from_pretrained`, since it makes the PeftModel. A model that has adapters is
    one already: there it does what the model's own `load_adapter` does, under a name that is not taken, and gives
    the model back. The new adapter is not active until `set_adapter` says so, as in peft.

    Args:
        model: attached; or a PeftModel that ktmoe made.
        model_id: a directory, or a name on the hub.
        adapter_name: the name to load it under.
        is_trainable: whether to go on training it.
        config: in the place of the one on disk.
        autocast_adapter_dtype: as peft takes it; expert LoRA is float32 in any case.
        ephemeral_gpu_offload: refused, as are `low_cpu_mem_usage` and `key_mapping`.
        low_cpu_mem_usage: refused.
        key_mapping: refused.
        **kwargs: `subfolder`, `revision`, `token` ... as peft takes them.

    Returns:
        The PeftModel; its only adapter is active.

    Raises:
        KTError: files whose keys are incomplete, of a wrong shape, or not for this model; an argument that is not
            peft's. The model stays as it was.

    Examples:
        >>> model = ktmoe.load_model(model_path, ktmoe.KTConfig(kt_backend="torch"), r=8)
        >>> model = ktmoe.load_adapter(model, adapter_path)
        >>> model(torch.tensor([[1, 2, 3]])).logits.shape
        torch.Size([1, 3, 64])
    """
    refuse_unsupported(
        ephemeral_gpu_offload=ephemeral_gpu_offload, low_cpu_mem_usage=low_cpu_mem_usage, key_mapping=key_mapping
    )
    if not isinstance(adapter_name, str) or not isinstance(is_trainable, bool):
        raise KTError(
            f"adapter_name, is_trainable: got {adapter_name!r}, {is_trainable!r}; expected a name and true or false, "
            "in this order, as PeftModel.from_pretrained takes them."
        )
    hub = hub_options("load_adapter", kwargs)
    if config is not None and not isinstance(config, PeftConfig):
        raise KTError(f"config: got {type(config).__name__}; expected a configuration of peft's.")
    if isinstance(model, PeftModel):
        return _add(model, model_id, adapter_name, is_trainable, config, autocast_adapter_dtype, kwargs)
    kind = (config or read_config(str(model_id), **hub)).peft_type
    if kind is not None and kind != PeftType.LORA:
        return _other_method(model, str(model_id), adapter_name, is_trainable, config, autocast_adapter_dtype, hub)
    adapter = read(model, str(model_id), config, hub)
    with all_or_nothing(model):
        peft_model = inject(
            model,
            config_of(adapter, model, is_trainable),
            adapter_name,
            autocast_adapter_dtype=autocast_adapter_dtype,
        )
        if not is_trainable:
            peft_model.eval()
        fill(peft_model, adapter, adapter_name)  # last: what it overwrites comes back only if it is the one that fails
    return peft_model


def _add(
    model: PeftModel, model_id: Any, name: str, is_trainable: bool, config: Any, autocast: bool, kwargs: dict[str, Any]
) -> PeftModel:
    if name in model.peft_config:
        raise KTError(
            f"adapter_name: the model has an adapter {name!r} already. Name another; `model.load_adapter(path, "
            f"{name!r})` replaces its numbers."
        )
    if config is not None:
        raise KTError("config: given for a model that has adapters; peft takes it for the first one only.")
    give_class(model)  # it may be stock peft's
    model.load_adapter(model_id, name, is_trainable=is_trainable, autocast_adapter_dtype=autocast, **kwargs)
    return model


def _other_method(
    model: nn.Module, source: str, name: str, is_trainable: bool, config: Any, autocast: bool, hub: dict[str, Any]
) -> PeftModel:
    """Adapters that are no LoRA: stock peft's, if there is nothing of routed experts in them."""
    config = config or read_config(source, **hub)
    check_other_method(config, model)
    if has_experts(peft.load_peft_weights(source, device="cpu", **hub)):
        raise KTError(f"{source}: got {config.peft_type.value}; the routed experts take LoRA adapters only.")
    with all_or_nothing(model), our_own():
        made = PeftModel.from_pretrained(
            model, source, name, is_trainable, config, autocast_adapter_dtype=autocast, **hub
        )
        watch(model)
    return made
