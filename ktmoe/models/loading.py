"""`load_model`: a model from disk whose routed experts transformers never loads; they are streamed to a backend."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, cast
from unittest import mock

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from ktmoe.checkpoints.names import CheckpointNames
from ktmoe.checkpoints.reader import HUB, Checkpoint
from ktmoe.config import KTConfig
from ktmoe.models.attaching import attach, auto_class, check_model
from ktmoe.models.families import expert_modules
from ktmoe.models.native import native_class, native_config
from ktmoe.processes import check_one_process
from ktmoe.types import KTError


if TYPE_CHECKING:
    from peft import LoraConfig

_REFUSED = (
    "state_dict",
    "gguf_file",
    "from_tf",
    "from_flax",
    "variant",
    "key_mapping",
    "tp_plan",
    "load_in_4bit",
    "load_in_8bit",
    "ignore_mismatched_sizes",
)
_PLACES = "Give a device_map that puts every module on a device, or offloads some of them beside others on a device."


def load_model(
    path: str | os.PathLike[str],
    config: KTConfig | None = None,
    lora: LoraConfig | None = None,
    r: int | None = None,
    **from_pretrained: Any,
) -> nn.Module:
    """A language model from disk or the hub, its routed experts run by ktmoe.

    transformers loads everything else, where `device_map` says. The experts stay in their memory-mapped files: the
    kernel packs them from there layer by layer, and the torch backend computes straight from them.

    Args:
        path: a directory with safetensors, or a name on the hub.
        config: which backend, threads, limits.
        lora: if given, the adapter is added too, on the experts and on the rest.
        r: the largest LoRA rank that adapters will have, where `lora` does not say it.
        **from_pretrained: `dtype`, `device_map`, `attn_implementation`, `revision`,
            `trust_remote_code` (used only where transformers has no class of its own) ... for transformers.

    Returns:
        The model, or a PeftModel around it if `lora` was given.

    Raises:
        KTError: shards that are missing, damaged, incomplete or of another model; or as `attach`.
        KernelError: the kernel failed a check.
    """
    check_one_process()
    refused = sorted(name for name in _REFUSED if from_pretrained.get(name))
    if refused:
        raise KTError(f"load_model: got {', '.join(refused)}; experts are streamed from safetensors. Leave it out.")
    device_map = from_pretrained.get("device_map")
    places = device_map.values() if isinstance(device_map, Mapping) else (device_map,)
    if any(str(place) == "meta" for place in places):
        raise KTError(f"device_map: got {device_map!r}; on the meta device there are no weights. {_PLACES}")
    config = config or KTConfig()
    hub = {k: v for k, v in from_pretrained.items() if k in HUB}
    trust = from_pretrained.pop("trust_remote_code", False)
    try:
        native = native_class(path, hub)
        with native_config(native):
            model_config = from_pretrained.pop("config", None)
            model_config = model_config or AutoConfig.from_pretrained(path, trust_remote_code=trust, **hub)
    except (OSError, ValueError, ImportError) as error:
        raise KTError(f"{path}: {error}") from error
    if trust and native:
        warnings.warn(
            f"ktmoe: trust_remote_code: {path} is loaded as transformers' own class ({native}); its remote code is "
            "not run.",
            stacklevel=2,
        )
        trust = False
    fp8 = forget_fp8(model_config)
    check_model(model_config, config, lora.r if lora is not None else r or 1, trust_remote_code=trust)
    checkpoint = Checkpoint(path, **hub)
    options = _options(from_pretrained, torch.bfloat16 if fp8 else "auto")
    with without_experts():
        model, info = auto_class(model_config).from_pretrained(
            path, config=model_config, trust_remote_code=trust, **options
        )
    _check_on_devices(model)
    _check_rest(model, checkpoint, info)
    return stream(model, checkpoint, config, lora, r)


def _check_on_devices(model: nn.Module) -> None:
    """Refuses a model that transformers left without weights. accelerate's hooks bring in what it offloaded."""
    for name, module in model.named_modules():
        lost = [p for p, value in module.named_parameters(name, recurse=False) if value.is_meta]
        if lost and not hasattr(module, "_hf_hook"):
            raise KTError(f"device_map: {lost[0]} has no weights: transformers left it on the meta device. {_PLACES}")


def _check_rest(model: nn.Module, checkpoint: Checkpoint, info: dict[str, Any]) -> None:
    """Refuses a model whose tensors outside the experts did not all come from the files.

    Args:
        model: as transformers loaded it.
        checkpoint: where from.
        info: what transformers says about it.

    Raises:
        KTError: names the file and the key.
    """
    names, tensors = CheckpointNames(model, ()), model.state_dict()
    for key in sorted(k if isinstance(k, str) else str(k[0]) for k in info["mismatched_keys"]):
        on_disk = next((k for k in checkpoint.shapes if names.parameter(k, (key,))), key)
        raise checkpoint.wrong_shape(on_disk, checkpoint.shapes.get(on_disk, ()), tuple(tensors[key].shape))
    missing = sorted(str(key) for key in info["missing_keys"])
    if missing:
        raise KTError(
            f"{checkpoint.path}: {len(missing)} tensors are missing, e.g. {', '.join(missing[:3])}. The files or "
            "config.json are incomplete or of another model."
        )


def _options(given: Mapping[str, Any], dtype: Any) -> dict[str, Any]:
    """Arguments of `from_pretrained` by the names of the installed release; `dtype` is the default."""
    options = {"dtype": dtype, **given}
    options["dtype"] = options.pop("torch_dtype", options["dtype"])
    release = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if release < (4, 56):
        options["torch_dtype"] = options.pop("dtype")
    if release < (5, 0) and find_spec("accelerate"):
        options.setdefault("low_cpu_mem_usage", True)  # the skeleton is made on meta, as later releases always do
    # A tensor of another shape is then named among the mismatched keys, by every release.
    return {**options, "output_loading_info": True, "ignore_mismatched_sizes": True}


def forget_fp8(model_config: Any) -> bool:
    """Takes FP8 with block scales off a configuration, since `stream` dequantises: transformers' own way needs a GPU.

    Returns:
        Whether it was there. The parameters of the model are bare FP8 numbers until `stream`.
    """
    quantization = getattr(model_config, "quantization_config", None)
    if not isinstance(quantization, dict) or quantization.get("quant_method") != "fp8":
        return False
    del model_config.quantization_config
    return True


def _dequantise(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Gives the parameters outside the experts what their FP8 numbers and block scales mean, in place.

    Raises:
        KTError: such a parameter is not in memory (`device_map` offloads it).
    """
    parameters = dict(model.named_parameters())
    names = CheckpointNames(model, ())
    dtype = cast(Any, model).get_input_embeddings().weight.dtype
    for key in checkpoint.fp8_keys():
        name = names.parameter(key, parameters)
        if name is None:  # an expert's, or of a layer that the model does not build
            continue
        if parameters[name].is_meta:
            raise KTError(f"device_map: {name} is offloaded, and FP8 weights are dequantised in memory. Leave it out.")
        # transformers 4 may have kept the parameter in FP8, whatever dtype was asked for.
        parameters[name].data = checkpoint.dequantise(key).to(parameters[name].device, dtype)


def stream(
    model: nn.Module,
    checkpoint: Checkpoint,
    config: KTConfig | None = None,
    lora: LoraConfig | None = None,
    r: int | None = None,
) -> nn.Module:
    """`attach` for a model that was made `without_experts`: they come from the checkpoint.

    Parameters that transformers read as bare FP8 numbers (`forget_fp8`) get their block scales.

    Raises:
        KTError: as `attach`; or matrices that are missing, there twice, or of another shape.
        KernelError: the kernel failed a check.
    """
    _dequantise(model, checkpoint)  # first: transformers 4 has a parameter for each matrix of an expert
    for name, absent in [(n, m) for n, m in model.named_modules() if isinstance(m, _Absent)]:
        _put(model, name, absent.experts[0])
    return attach(model, config, lora, r, checkpoint=checkpoint)


class _Absent(nn.Module):
    """Stands for the routed experts of a layer while transformers loads the rest."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = (experts.to("meta"),)  # no submodule: transformers must not see its parameters


@contextmanager
def without_experts() -> Iterator[None]:
    """Within it, transformers makes models without their routed experts; `stream` brings them back.

    transformers never reads a tensor of a checkpoint that has no parameter to go to.
    """
    ready, ignore = PreTrainedModel.post_init, "_keys_to_ignore_on_load_unexpected"
    with ExitStack() as patches:

        def post_init(self: Any) -> Any:
            names = [name for holders in expert_modules(self).values() for name in holders]
            for name in names:
                module = self.get_submodule(name)
                if not isinstance(module, _Absent):  # the model inside was here before
                    _put(self, name, _Absent(module))
            unread = {rf"\.{re.escape(name.rpartition('.')[2])}\." for name in ("experts", *names)}
            ignored = [*(getattr(self, ignore) or ()), r"_scale_inv$", *sorted(unread)]
            patches.enter_context(mock.patch.object(type(self), ignore, ignored))
            return ready(self)

        patches.enter_context(mock.patch.object(PreTrainedModel, "post_init", post_init))
        yield


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
