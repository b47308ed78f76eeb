"""Adapters in memory and on disk: peft's per-expert files outside, stacked parameters inside.

In memory an expert LoRA is six stacked tensors under native keys. On disk it is what peft writes for one `nn.Linear`
per expert, `...experts.{e}.gate_proj.lora_A.weight` [r, in], which peft, transformers and serving engines read.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import os
import re
import unittest.mock
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import peft
import torch
from peft import LoraConfig, PeftConfig, PeftModel, load_peft_weights, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ktmoe.experts import MoEExperts
from ktmoe.layout import CheckpointLayout, checkpoint_layout
from ktmoe.peft_layer import PLAIN_INIT, LoraExperts
from ktmoe.types import PROJECTIONS, KTError


_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"
_HUB = ("subfolder", "revision", "cache_dir", "token", "use_auth_token", "force_download", "local_files_only")
EXPERTS_TARGET = "experts"
_NOT_ON_EXPERTS = (
    "use_dora", "lora_bias", "use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config", "eva_config",
    "corda_config", "loftq_config", "trainable_token_indices", "layer_replication",
)  # fmt: skip
_EXPERT_KEY = re.compile(r"\.experts\.(\d+|base_layer|lora_)")


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
        A PeftModel that saves and loads expert LoRA in PEFT's per-expert format.

    Raises:
        KTError: a LoRA variant that the experts do not have.
    """
    _refuse_options(kwargs)
    prepared = prepare_config(peft_config, model)
    with _native_names():
        peft_model = peft.get_peft_model(model, prepared, adapter_name=adapter_name, **kwargs)
    return _as_ktmoe(peft_model)


def load_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    is_trainable: bool = False,
    adapter_name: str = "default",
    **hub: Any,
) -> PeftModel:
    """`PeftModel.from_pretrained` for a model whose routed experts ktmoe runs.

    Args:
        model: attached, without adapters.
        path: a directory, or a name on the hub.
        is_trainable: whether to go on training it.
        adapter_name: the name to load it under.
        **hub: `subfolder`, `revision`, `token` ... as peft takes them.

    Returns:
        The PeftModel with the adapter active.

    Raises:
        KTError: files whose expert keys are incomplete, of a wrong shape, or not for this model.
    """
    hub = {k: v for k, v in hub.items() if k in _HUB and v is not None}
    config = _read_config(model, str(path), is_trainable, hub)
    peft_model = get_peft_model(model, config, adapter_name)
    peft_model.load_adapter(path, adapter_name, is_trainable=is_trainable, **hub)
    return peft_model


def prepare_config(peft_config: LoraConfig, model: nn.Module) -> LoraConfig:
    """The configuration that injects adapters into an attached model: ktmoe's layer registered, targets resolved.

    Raises:
        KTError: options that the experts' LoRA does not have, or a target that names some of their projections only.
    """
    config = copy.deepcopy(peft_config)
    experts = [n.removesuffix(".base_layer") for n, m in model.named_modules() if isinstance(m, MoEExperts)]
    config.target_modules, reached = _resolve_targets(config, model, experts)
    inside = [e for e in experts for saved in config.modules_to_save or () if f".{e}.".find(f".{saved}.") >= 0]
    if inside:
        raise KTError(
            f"modules_to_save: got {_shown(config.modules_to_save)}, which holds the routed experts ({inside[0]}); "
            "their own weights are frozen. Name modules outside of them; experts get LoRA by target_modules."
        )
    if experts and not reached:
        warnings.warn(
            f"ktmoe: target_modules = {_shown(peft_config.target_modules)} leaves the routed experts without LoRA; "
            "they stay frozen. Add 'experts' (or gate_proj, up_proj and down_proj) to train them.",
            stacklevel=3,
        )
    if reached:
        check_lora_config(config)
        if config.lora_dropout:
            warnings.warn(
                f"ktmoe: lora_dropout = {config.lora_dropout} is not applied to the routed experts, only to the rest.",
                stacklevel=3,
            )
    config._register_custom_module({MoEExperts: LoraExperts})
    return config


def check_lora_config(config: LoraConfig) -> None:
    """Refuses options that the LoRA of routed experts does not have, before a model is touched.

    Raises:
        KTError: names the option.
    """
    for name in _NOT_ON_EXPERTS:
        if getattr(config, name, None):
            raise KTError(
                f"{name}: got {getattr(config, name)}; the routed experts have plain LoRA only. Leave it out."
            )
    for name in ("rank_pattern", "alpha_pattern"):
        if getattr(config, name, None):
            raise KTError(f"{name}: got {getattr(config, name)}; all routed experts share one rank. Leave it out.")
    if getattr(config, "target_parameters", None):
        raise KTError("target_parameters: the routed experts are no parameters here. Write target_modules: experts.")
    if config.init_lora_weights not in PLAIN_INIT:
        raise KTError(
            f"init_lora_weights: got {config.init_lora_weights!r}; the routed experts take True, False or 'gaussian'."
        )


def _resolve_targets(config: LoraConfig, model: Any, experts: list[str]) -> tuple[Any, set[str]]:
    """Targets that peft matches in an attached model, and the layers of routed experts among them."""
    targets = config.target_modules
    names = _projection_names(model)
    if targets is None:
        return None, set()  # peft's default for the architecture, which names attention projections
    if isinstance(targets, str):
        if targets.lower() == "all-linear":
            head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
            linear = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
            return _with_experts(linear, set(experts), experts)
        layers = (nn.Linear, nn.Embedding)
        matched = {n for n, m in model.named_modules() if isinstance(m, layers) and re.fullmatch(targets, n)}
        tails = ("", *(f".0.{p}" for p in names), *(f".{p}" for p in names))
        return _with_experts(
            matched, {e for e in experts if any(re.fullmatch(targets, e + t) for t in tails)}, experts
        )

    def meant(name: str) -> bool:
        return any(name == t or name.endswith(f".{t}") for t in targets)

    reached = {e for e in experts if meant(e)}
    for e in set(experts) - reached:
        named = [p for p in names if meant(f"{e}.{p}")]
        if named and len(named) < len(names):
            raise KTError(
                f"target_modules: got {_shown(targets)}; LoRA on the routed experts covers {', '.join(names)} "
                "together. Name all three, or 'experts', or none of them."
            )
        if named:
            reached.add(e)
    return _with_experts(set(targets), reached, experts)


def _with_experts(targets: set[str], reached: set[str], experts: list[str]) -> tuple[set[str], set[str]]:
    """Adds the reached layers by one short name if they are all, else each by its own."""
    return targets | ({EXPERTS_TARGET} if reached and reached == set(experts) else reached), reached


class _KTPeftMixin:
    """Save and load of a PeftModel whose expert LoRA is stacked in memory."""

    def save_pretrained(
        self: Any,
        save_directory: str,
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """`PeftModel.save_pretrained`; expert LoRA goes to the same file in PEFT's per-expert format."""
        if not safe_serialization:
            raise KTError("safe_serialization: got False; adapters are saved as safetensors only. Leave it at True.")
        state = kwargs.pop("state_dict", None)
        state = self.state_dict() if state is None else state
        prefixes = tuple(f"{name}." for name, _ in _expert_layers(self))
        kwargs["state_dict"] = {k: v for k, v in state.items() if not k.startswith(prefixes)} if prefixes else state
        super().save_pretrained(save_directory, True, selected_adapters, **kwargs)  # type: ignore[misc]
        for adapter in selected_adapters or list(self.peft_config):
            if kwargs.get("is_main_process", True):
                folder = Path(save_directory) / ("" if adapter == "default" else adapter)
                _add_experts(self, folder, adapter, state)

    def merge_and_unload(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Refused as a whole while the experts have LoRA: peft merges module by module."""
        _refuse_merge(self)
        return self.base_model.merge_and_unload(*args, **kwargs)

    def merge_adapter(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Refused as a whole while the experts have LoRA: peft merges module by module."""
        _refuse_merge(self)
        return self.base_model.merge_adapter(*args, **kwargs)

    def load_adapter(self: Any, model_id: str, adapter_name: str, is_trainable: bool = False, **kwargs: Any) -> Any:
        """`PeftModel.load_adapter`; reads PEFT's per-expert format into the stacked parameters."""
        _refuse_options(kwargs)
        hub = {k: v for k, v in kwargs.items() if k in _HUB and v is not None}
        new = adapter_name not in self.peft_config
        if new:
            self.add_adapter(adapter_name, _read_config(self.get_base_model(), str(model_id), is_trainable, hub))
        try:
            return self._read_adapter(str(model_id), adapter_name, is_trainable, hub)
        except Exception:
            if new:  # an adapter that did not load must not stay behind half made
                self.delete_adapter(adapter_name)
            raise

    def _read_adapter(self: Any, model_id: str, adapter_name: str, is_trainable: bool, hub: dict[str, Any]) -> Any:
        weights = load_peft_weights(model_id, device="cpu", **hub)
        layers = {name: layer for name, layer in _expert_layers(self) if layer.stacked(adapter_name)}
        rest = _load_experts(layers, adapter_name, weights, _layout(self), model_id)
        with _native_names():
            result = set_peft_model_state_dict(self, rest, adapter_name=adapter_name)
        prefixes = tuple(f"{name}." for name in layers)
        missing = [k for k in result.missing_keys if "lora_" in k and f".{adapter_name}." in k]
        missing = [k for k in missing if not k.startswith(prefixes or ("\0",))]
        if result.unexpected_keys or missing:
            raise KTError(
                f"{model_id}: the adapter does not fit this model. Missing: {missing[:5] or 'none'}; not expected: "
                f"{result.unexpected_keys[:5] or 'none'}."
            )
        result.missing_keys[:] = missing
        if not is_trainable:
            self.eval()
        return result

    def add_adapter(self: Any, adapter_name: str, peft_config: LoraConfig, **kwargs: Any) -> None:
        """`PeftModel.add_adapter`, for the routed experts too."""
        _refuse_options(kwargs)
        with _native_names():
            prepared = prepare_config(peft_config, self.get_base_model())
            super().add_adapter(adapter_name, prepared, **kwargs)  # type: ignore[misc]


def _read_config(model: nn.Module, path: str, is_trainable: bool, hub: dict[str, Any]) -> LoraConfig:
    """A saved adapter's configuration, its targets narrowed to the modules that its file has.

    On disk gate_proj names the routed experts and any dense MLP alike; the keys say which of them were trained.
    """
    config = PeftConfig.from_pretrained(path, **hub)
    config.inference_mode = not is_trainable
    layout = _layout(model)
    keys = [layout.to_module(k) for k in load_peft_weights(path, device="cpu", **hub) if ".lora_" in k]
    saved = {k.rsplit(".lora_", 1)[0].removeprefix("base_model.model.") for k in keys}
    modules = {m for m in saved if not _EXPERT_KEY.search(f"{m}.lora_")}
    targets = config.target_modules if isinstance(config.target_modules, (set, list)) else modules
    kept = {t for t in targets if any(m == t or m.endswith(f".{t}") for m in modules)}
    reached = {n for n, _ in model.named_modules() if any(n == t or n.endswith(f".{t}") for t in kept)}
    experts = {f"{m.rpartition('.experts.')[0]}.experts" for m in saved - modules}
    config.target_modules = (kept if reached == modules else modules) | experts
    return config


def _refuse_merge(model: nn.Module) -> None:
    if _expert_layers(model):
        raise KTError(
            "merge: the routed experts cannot be merged in memory yet. Load the saved adapter with stock transformers "
            "and peft on the base model, and merge there."
        )


def _refuse_options(options: dict[str, Any]) -> None:
    """Refuses peft's options that would leave the experts' LoRA unloaded without a word."""
    for name in ("low_cpu_mem_usage", "ephemeral_gpu_offload", "key_mapping", "ignore_mismatched_sizes"):
        if options.get(name):
            raise KTError(f"{name}: got {options[name]!r}; not supported with routed experts. Leave it out.")


@functools.cache
def _ktmoe_class(cls: Any) -> Any:
    return type(cls.__name__, (_KTPeftMixin, cls), {"__doc__": cls.__doc__, "__module__": __name__})


def _as_ktmoe(peft_model: PeftModel) -> PeftModel:
    if not isinstance(peft_model, _KTPeftMixin):
        stock: Any = type(peft_model)
        peft_model.__class__ = _ktmoe_class(stock)
    return peft_model


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


def _layout(model: nn.Module) -> CheckpointLayout:
    config = getattr(model, "config", None)
    return checkpoint_layout(getattr(config, "model_type", None))


def _projection_names(model: nn.Module) -> tuple[str, ...]:
    return tuple(_layout(model).projections[p] for p in PROJECTIONS)


def _add_experts(model: Any, folder: Path, adapter: str, state: dict[str, Tensor]) -> None:
    """Writes expert LoRA beside the rest, in one file that is replaced as a whole, and the targets that name it."""
    layout = _layout(model)
    tensors: dict[str, Tensor] = {}
    for name, layer in _expert_layers(model):
        for key in layer.stacked(adapter):
            projection, side = key.split(".")
            stack = state[f"{name}.{side}.{adapter}.{projection}"].detach().cpu()
            for e in range(len(stack)):
                where = layout.to_disk(f"{name}.{e}.{layout.projections[projection]}")
                tensors[f"{where}.{side}.weight"] = stack[e].clone()
    if not tensors:
        return
    path = folder / _WEIGHTS
    if not path.exists():
        raise KTError(f"{path}: expert LoRA is saved as safetensors only. Leave safe_serialization at True.")
    with safe_open(path, "pt") as file:
        rest = {key: file.get_tensor(key) for key in file.keys()}
    tensors |= rest
    part = path.with_suffix(".part")
    save_file(tensors, part, metadata={"format": "pt"})
    os.replace(part, path)
    config_path = folder / _CONFIG
    config = json.loads(config_path.read_text())
    targets = {t for t in config["target_modules"] if t.rpartition(".")[2] != EXPERTS_TARGET} | set(
        layout.projections.values()
    )
    config["target_modules"] = sorted(targets)
    part = config_path.with_suffix(".part")
    part.write_text(json.dumps(config, indent=2, sort_keys=True))
    os.replace(part, config_path)
    unread = "" if layout.peft_reads else "the routed experts of this family"
    if layout.peft_reads and any(f".{p}.lora_" in key for key in rest for p in layout.projections.values()):
        unread = "LoRA on shared experts and dense MLPs beside routed experts"  # it renames both to the latter
    if unread:
        warnings.warn(
            f"ktmoe: stock peft {peft.__version__} does not read {unread} rightly from {folder}; "
            "ktmoe.load_adapter does.",
            stacklevel=3,
        )


def _load_experts(
    layers: dict[str, LoraExperts], adapter: str, weights: dict[str, Tensor], layout: CheckpointLayout, source: str
) -> dict[str, Tensor]:
    """Copies per-expert tensors into the stacked parameters, all or nothing. Returns what is not an expert's."""
    rest = {layout.to_module(k): v for k, v in weights.items()}
    plan: list[tuple[Tensor, Tensor]] = []
    missing, wrong = [], []
    for name, layer in layers.items():
        for key, parameter in layer.stacked(adapter).items():
            projection, side = key.split(".")
            for e in range(len(parameter)):
                on_disk = f"{name}.{e}.{layout.projections[projection]}.{side}.weight"
                tensor = rest.pop(on_disk, None)
                if tensor is None:
                    missing.append(on_disk)
                elif tensor.shape != parameter[e].shape:
                    wrong.append(f"{on_disk} is {tuple(tensor.shape)}, expected {tuple(parameter[e].shape)}")
                else:
                    plan.append((parameter.data[e], tensor))
    left = [k for k in rest if _EXPERT_KEY.search(k)]
    if missing or wrong or left:
        shown = [f"{len(b)} {what}, e.g. {b[0]}" for b, what in
                 ((missing, "missing"), (wrong, "of a wrong shape"), (left, "not expected")) if b]  # fmt: skip
        raise KTError(f"{source}: expert LoRA does not fit this model: {'; '.join(shown)}.")
    with torch.no_grad():
        for mine, theirs in plan:
            mine.copy_(theirs)
    return rest


def _shown(targets: str | Iterable[str] | None) -> str:
    return repr(targets) if targets is None or isinstance(targets, str) else "[" + ", ".join(sorted(targets)) + "]"
