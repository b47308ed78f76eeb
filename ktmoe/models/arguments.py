"""The arguments of `from_pretrained`, as `load_model` takes them."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import transformers
from transformers import AutoConfig, PretrainedConfig

from ktmoe.checkpoints import HUB, refuse_adapter
from ktmoe.config import KTConfig
from ktmoe.models.native import native_class, native_config
from ktmoe.models.rest_in_bits import check_quantiser
from ktmoe.types import KTError


# Of `from_pretrained`: what has no meaning where the experts come from files, and what to do instead.
_REFUSED = {
    "state_dict": "load the model with transformers and give it to ktmoe.attach",
    "gguf_file": "convert it to safetensors (transformers loads it, save_pretrained writes it)",
    "from_tf": "convert it to safetensors",
    "from_flax": "convert it to safetensors",
    "key_mapping": "rename the keys in the files",
    "tp_plan": "one process holds the experts",
    "tp_size": "one process holds the experts",
    "device_mesh": "one process holds the experts",
    "distributed_config": "one process holds the experts",
    "load_in_4bit": "quantization_config=BitsAndBytesConfig(load_in_4bit=True) is for what is not routed experts",
    "load_in_8bit": "quantization_config=BitsAndBytesConfig(load_in_8bit=True) is for what is not routed experts",
    "ignore_mismatched_sizes": "files of other sizes are of another model",
}
PLACES = "Give a device_map that puts every module on a device, or offloads some of them beside others on a device."


class UnknownArgument(KTError, TypeError):
    """An argument that neither `from_pretrained`, nor the configuration, nor the model has."""


def check_arguments(from_pretrained: Mapping[str, Any]) -> None:
    """Refuses arguments that have no meaning where the experts come from files.

    Raises:
        KTError: names the first.
    """
    refused = [name for name in _REFUSED if from_pretrained.get(name)]
    if refused:
        raise KTError(f"load_model: got {refused[0]}; with ktmoe, {_REFUSED[refused[0]]}. Leave it out.")
    if (quantised := from_pretrained.get("quantization_config")) is not None:
        check_quantiser(quantised)
    device_map = from_pretrained.get("device_map")
    places = device_map.values() if isinstance(device_map, Mapping) else (device_map,)
    if any(str(place) == "meta" for place in places):
        raise KTError(f"device_map: got {device_map!r}; on the meta device there are no weights. {PLACES}")


def configurations(config: Any, kt_config: KTConfig | None) -> tuple[Any, KTConfig]:
    """transformers' configuration, if it was given, and ktmoe's.

    Raises:
        KTError: two of ktmoe's, or something else.
    """
    if kt_config is not None and isinstance(config, KTConfig):
        raise KTError("load_model: got config and kt_config, both of ktmoe. Leave one of them out.")
    for name, value, fits in (
        ("config", config, (KTConfig, PretrainedConfig, type(None))),
        ("kt_config", kt_config, (KTConfig, type(None))),
    ):
        if not isinstance(value, fits):
            raise KTError(
                f"load_model: {name}: got {value!r}; expected ktmoe.KTConfig(kt_backend=...)"
                f"{' or a configuration of transformers (AutoConfig.from_pretrained)' if name == 'config' else ''}."
            )
    if isinstance(config, KTConfig):
        return None, config
    return copy.deepcopy(config), kt_config or KTConfig()


def model_configuration(
    path: str | os.PathLike[str], given: Any, from_pretrained: Mapping[str, Any]
) -> tuple[Any, bool, dict[str, Any]]:
    """The model's configuration, whether its remote code is run, and the arguments that the configuration left.

    Raises:
        KTError: no such model, or an adapter in its place.
    """
    rest = {k: v for k, v in from_pretrained.items() if k not in HUB}
    hub = {k: v for k, v in from_pretrained.items() if k in HUB and v is not None}
    trust = bool(rest.pop("trust_remote_code", False))
    refuse_adapter(path, hub)
    if given is not None:
        return given, trust and not type(given).__module__.startswith("transformers."), rest
    # "auto" is no dtype that it could hold, and the checkpoint's own quantisation stays in it.
    held = {k: rest.pop(k) for k in ("dtype", "torch_dtype", "quantization_config") if k in rest}
    code = {k: rest[k] for k in ("code_revision",) if k in rest}  # of the configuration's class and the model's
    try:
        native = native_class(path, hub)
        with native_config(native):
            model_config, rest = AutoConfig.from_pretrained(
                path, return_unused_kwargs=True, trust_remote_code=trust, **hub, **rest
            )
    except (OSError, ValueError, ImportError) as error:
        raise KTError(f"{path}: {error}") from error
    if trust and native:
        warnings.warn(
            f"ktmoe: trust_remote_code: {path} is loaded as transformers' own class ({native}); its remote code is "
            "not run.",
            stacklevel=3,
        )
    return model_config, trust and not native, {**rest, **held, **code}


def whose(options: Mapping[str, Any]) -> str:
    """Where a key of ktmoe's belongs, for the error that transformers raises."""
    keys = sorted(set(options) & set(KTConfig.field_help()))
    return f". {keys[0]} belongs into ktmoe.KTConfig({keys[0]}=...)" if keys else ""


def options_for(given: Mapping[str, Any], dtype: Any) -> dict[str, Any]:
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
