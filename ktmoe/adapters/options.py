"""Arguments of peft's functions: which the installed peft knows, which concern the hub, and which are refused."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from huggingface_hub import hf_hub_download

from ktmoe.types import KTError


# Read by stock peft for models of which a part is offloaded; the adapter goes where its layers are.
_PASSED_OVER = ("offload_folder", "offload_dir", "torch_device", "use_safetensors")


def hub_options(function: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Those that say where an adapter's files are: `subfolder`, `revision`, `token` ... as peft takes them.

    Raises:
        KTError: names any other.
    """
    names = {*inspect.signature(hf_hub_download).parameters, "use_auth_token"} - {"repo_id", "filename"}
    unknown = sorted(k for k, v in given.items() if k not in names and k not in _PASSED_OVER and v is not None)
    if unknown:
        raise KTError(
            f"{function}: got {', '.join(f'{k}={given[k]!r}' for k in unknown)}, which it does not know. Expected "
            "peft's arguments, and those that say where the files are: subfolder, revision, token, cache_dir ..."
        )
    return {k: v for k, v in given.items() if k in names and v is not None}


def known(function: Callable[..., Any], **options: Any) -> dict[str, Any]:
    """The options that the installed peft's function takes: older releases have not all of them."""
    parameters = inspect.signature(function).parameters
    return {k: v for k, v in options.items() if k in parameters}


def refuse_unsupported(**options: Any) -> None:
    """Refuses peft's options that would leave the experts' LoRA unloaded without a word."""
    for name, value in options.items():
        if value:
            raise KTError(f"{name}: got {value!r}; not supported with routed experts. Leave it out.")
