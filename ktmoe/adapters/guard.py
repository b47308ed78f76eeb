"""What peft's and transformers' own functions may not do to a model whose routed experts ktmoe runs.

They do not know such experts: they would leave them out without a word, or fail in the middle. Each is told apart
before it has changed anything, in one sentence with the remedy. Models without such experts are never touched.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import unittest.mock
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import peft
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_target_module_exists
from peft.utils import ModulesToSaveWrapper
from torch import nn

from ktmoe.adapters.beside import EXPERTS_FILE, folder_of
from ktmoe.adapters.files import has_experts
from ktmoe.adapters.layer import LoraExperts
from ktmoe.adapters.targets import layout_of
from ktmoe.experts import MoEExperts
from ktmoe.types import PROJECTIONS, KTError


_LOAD = "Load it with `ktmoe.load_adapter(model, path)`; a model that has adapters, with its own `load_adapter`."
_TRANSFORMERS = "transformers' own function would leave out of a model whose experts ktmoe runs"
_ours = contextvars.ContextVar("ktmoe_injects", default=False)


@contextlib.contextmanager
def our_own() -> Iterator[None]:
    """Within it, peft is called by ktmoe: it does not refuse, and peft (0.19 on) does not rename for transformers 5.

    peft would rename expert targets and keys to fused parameters, which an attached model does not have.
    """
    token = _ours.set(True)
    with contextlib.ExitStack() as stack:
        stack.callback(_ours.reset, token)
        with contextlib.suppress(ImportError):  # before 0.19, or transformers 4
            from peft.utils import transformers_weight_conversion as conversion

            keep = unittest.mock.patch.object
            stack.enter_context(keep(conversion, "convert_peft_config_for_transformers", lambda *a, **k: None))
            name = "convert_peft_adapter_state_dict_for_transformers"
            if hasattr(conversion, name):
                same = lambda model, peft_config, adapter_state_dict, *a, **k: adapter_state_dict  # noqa: E731
                stack.enter_context(keep(conversion, name, same))
        yield


def expert_names(model: nn.Module) -> list[str]:
    """Modules of routed experts that ktmoe runs, as they were named before peft put a layer around them."""
    return [n.removesuffix(".base_layer") for n, m in model.named_modules() if isinstance(m, MoEExperts)]


def check_other_method(config: Any, model: nn.Module) -> None:
    """Refuses peft's other methods where they name routed experts, which have LoRA alone.

    Raises:
        KTError: names the method and what it reaches.
    """
    for name in _reached(config, model, (*layout_of(model).projections.values(), *PROJECTIONS)):
        raise KTError(
            f"peft_config: got {config.peft_type.value}, whose target_modules or modules_to_save reach the routed "
            f"experts ({name}); they can have LoRA only. Name modules outside of them, such as q_proj, or use "
            "LoraConfig."
        )


def _reached(config: Any, model: nn.Module, projections: Collection[str]) -> list[str]:
    """Routed experts that a configuration names: their module, a projection of an expert, or a module around them."""
    found = []
    targets = getattr(config, "target_modules", None)
    parameters = getattr(config, "target_parameters", None) or ()
    whole = getattr(config, "modules_to_save", None) or ()
    for name in expert_names(model):
        inside = [name, *(f"{name}.{e}{p}" for e in ("", "0.") for p in projections)]
        fused = [f"{name}.{p}" for p in ("gate_up_proj", "down_proj")]
        if (
            (targets and any(check_target_module_exists(config, key) for key in inside))
            or any(f == p or f.endswith(f".{p}") for f in fused for p in parameters)
            or any(f".{w}." in f".{name}." for w in whole)
        ):
            found.append(name)
    return found


def install() -> None:
    """Has peft ask first. Later calls do nothing."""
    if getattr(BaseTuner.inject_adapter, "__ktmoe__", False):
        return
    _wrap(BaseTuner, "inject_adapter", _check_injection)
    _wrap(PeftModel, "load_adapter", _check_files)
    with contextlib.suppress(ImportError):  # before peft 0.14
        from peft.utils import hotswap

        for name in ("hotswap_adapter_from_state_dict", "_convert_scalings_to_tensor"):
            if hasattr(hotswap, name):
                _wrap(hotswap, name, _check_hotswap)
    with contextlib.suppress(ImportError):  # before 0.15
        from peft.optimizers.lorafa import LoraFAOptimizer

        _wrap(LoraFAOptimizer, "__init__", _check_lorafa)


def _wrap(owner: Any, name: str, check: Any) -> None:
    original = getattr(owner, name)

    @functools.wraps(original)
    def asking(*args: Any, **kwargs: Any) -> Any:
        if not _ours.get():
            check(*args, **kwargs)
        return original(*args, **kwargs)

    asking.__ktmoe__ = True  # type: ignore[attr-defined]
    setattr(owner, name, asking)


def _check_injection(tuner: Any, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
    config = tuner.peft_config[adapter_name]
    exact = isinstance(getattr(config, "target_modules", None), str)  # a pattern that names an expert means it
    for name in _reached(config, model, tuple(layout_of(model).projections.values()) if exact else ()):
        raise KTError(
            f"peft_config: it names routed experts ({name}), which peft's own functions, and TRL's `peft_config`, "
            "cannot adapt. Call `ktmoe.get_peft_model(model, peft_config)`, for a saved adapter "
            "`ktmoe.load_adapter(model, path)`; a trainer takes the model that they return, and no peft_config."
        )


def _check_files(peft_model: Any, model_id: Any, adapter_name: str = "default", *args: Any, **kwargs: Any) -> None:
    """The forked stack's expert LoRA is in a file that peft does not open."""
    base = peft_model.get_base_model()
    if expert_names(base) and Path(model_id, kwargs.get("subfolder") or "", EXPERTS_FILE).is_file():
        _take_out(base, [f".{adapter_name}."])
        raise KTError(f"load_adapter: {model_id} has LoRA on routed experts in {EXPERTS_FILE}. {_LOAD}")


def _check_hotswap(model: nn.Module, *args: Any, **kwargs: Any) -> None:
    if any(isinstance(m, LoraExperts) for m in model.modules()):
        raise KTError(
            "hotswap: LoRA of routed experts is stacked in memory, which peft's hot swapping does not know. "
            "`model.load_adapter(path, adapter_name)` with the name of a loaded adapter replaces its numbers in place."
        )


def _check_lorafa(optimizer: Any, params: Any, *args: Any, **kwargs: Any) -> None:
    params = list(params)
    named = [
        (n, p) for g in params if isinstance(g, dict) for n, p in zip(g.get("names", ()), g["params"], strict=False)
    ]
    if not any(".lora_" in n and p.dim() == 3 for n, p in named):
        return
    trained = {n for n, p in named if p.requires_grad}
    for name, parameter in named:  # `create_lorafa_optimizer` has frozen every A by now
        if ".lora_A." in name and name.replace(".lora_A.", ".lora_B.") in trained:
            parameter.requires_grad_(True)
    raise KTError(
        "create_lorafa_optimizer: LoRA of routed experts is stacked, and LoRA-FA takes every parameter for the matrix "
        "of one layer. Use AdamW, or LoRA+ (peft.optimizers.create_loraplus_optimizer)."
    )


def watch(model: nn.Module) -> None:
    """Has a model refuse, whenever numbers are loaded into it, expert LoRA that would be left out. Once is enough."""
    install()
    hooks = model._load_state_dict_pre_hooks.values()
    if not any(getattr(hook, "hook", hook) is refuse_lost_experts for hook in hooks):
        model._register_load_state_dict_pre_hook(refuse_lost_experts, with_module=True)


def unwatch(model: nn.Module) -> None:
    """Takes `watch` back."""
    hooks = model._load_state_dict_pre_hooks
    for key in [k for k, hook in hooks.items() if getattr(hook, "hook", hook) is refuse_lost_experts]:
        del hooks[key]


def refuse_lost_experts(model: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """Called by torch before a model's tensors are loaded.

    Raises:
        KTError: expert LoRA is among them that no module here takes. Adapters that stock peft has just put into the
            model for it, and which are still empty, are taken out again.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, (LoraExperts, MoEExperts))}
    own = {f"{prefix}{n}.{p}" for n, m in layers.items() for p, _ in m.named_parameters()}
    inside = tuple(f"{prefix}{n}." for n in layers)
    lost = [k for k in state_dict if "lora_" in k and k not in own and (has_experts([k]) or k.startswith(inside))]
    if not lost:
        return
    _take_out(model, lost)
    raise KTError(
        f"{len(lost)} tensors of LoRA on routed experts would be left out, e.g. {lost[0]}: peft's and transformers' "
        f"own loading does not know experts that ktmoe runs. {_LOAD}"
    )


def _take_out(model: Any, keys: list[str]) -> None:
    """Undoes what stock peft did for an adapter that is about to be refused, if its own LoRA is still empty."""
    configs = getattr(model, "peft_config", None) or {}
    name = next((n for n in configs if any(n in k.split(".") for k in keys)), None)
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, (BaseTunerLayer, ModulesToSaveWrapper))]
    filled = (p for n, p in model.named_parameters() if ".lora_B." in n and name in n.split("."))
    if name is None or any(isinstance(m, LoraExperts) for _, m in layers) or any(p.any() for p in filled):
        return
    if len(configs) > 1:
        for _, layer in layers:
            if isinstance(layer, BaseTunerLayer):
                layer.delete_adapter(name)
        del configs[name]
        return
    for path, module in layers:
        parent, _, leaf = path.rpartition(".")
        inner = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module.original_module
        setattr(model.get_submodule(parent), leaf, inner)
    vars(model).pop("peft_config", None)
    vars(model).pop("_hf_peft_config_loaded", None)


def refuse_expert_adapter(model: Any, load: Any, peft_model_id: Any = None, *args: Any, **kwargs: Any) -> Any:
    """transformers' `model.load_adapter`, for adapters that leave the routed experts alone.

    Args:
        model: attached.
        load: the method of its class.
        peft_model_id: as transformers takes it.
        *args: for transformers.
        **kwargs: for transformers.

    Raises:
        KTError: the adapter has LoRA on routed experts.
    """
    state = kwargs.get("adapter_state_dict")
    if state is None and peft_model_id is not None:
        hub = {**kwargs, **(kwargs.get("adapter_kwargs") or {})}
        known = ("subfolder", "revision", "cache_dir", "token", "force_download", "local_files_only")
        hub = {k: v for k, v in hub.items() if k in known and v is not None}
        forked = (folder_of(str(peft_model_id), hub) / EXPERTS_FILE).is_file()
        state = [EXPERTS_FILE] if forked else peft.load_peft_weights(str(peft_model_id), device="cpu", **hub)
        if forked or has_experts(state):
            raise KTError(f"load_adapter: {peft_model_id} has LoRA on routed experts, which {_TRANSFORMERS}. {_LOAD}")
    elif state is not None and has_experts(state):
        raise KTError(f"load_adapter: adapter_state_dict has LoRA on routed experts, which {_TRANSFORMERS}. {_LOAD}")
    return load(model, peft_model_id, *args, **kwargs)
