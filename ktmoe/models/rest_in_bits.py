"""Everything but the routed experts in 4 or 8 bits, by bitsandbytes: what may be, and what stays as it is."""

from __future__ import annotations

import copy
from importlib.util import find_spec
from typing import Any

import transformers
from torch import nn

from ktmoe.checkpoints import Checkpoint, CheckpointNames
from ktmoe.models.families import expert_modules, find
from ktmoe.types import KTError


def check_quantiser(quantised: Any) -> None:
    """Refuses what is not for bitsandbytes.

    Args:
        quantised: `quantization_config`, as `from_pretrained` takes it.

    Raises:
        KTError: another quantiser's, or bitsandbytes is not installed.
    """
    if not isinstance(quantised, transformers.BitsAndBytesConfig):
        raise KTError(
            f"load_model: quantization_config: got {type(quantised).__name__}; expected "
            "transformers.BitsAndBytesConfig, which is for what is not routed experts. kt_backend: AMXInt8 quantises "
            "those."
        )
    check_installed("load_model: quantization_config")


def check_installed(argument: str) -> None:
    """Raises KTError if bitsandbytes is not there.

    Args:
        argument: that asks for it, for the message.
    """
    if find_spec("bitsandbytes") is None:
        raise KTError(f"{argument}: bitsandbytes is not installed: pip install bitsandbytes")


def linear_routers(model: nn.Module, checkpoint: Checkpoint) -> list[str]:
    """Routers, and gates of shared experts, that are linear layers: what bitsandbytes would quantise too.

    Args:
        model: from `make_skeleton`.
        checkpoint: its files.

    Raises:
        KTError: what is outside of the experts is quantised in the checkpoint already.
    """
    names, parameters = CheckpointNames(model, ()), dict(model.named_parameters())
    experts = {h for holders in expert_modules(model).values() for h in holders}
    for key in checkpoint.stored_keys():
        name = names.parameter(key, parameters)
        if name and not any(name.startswith(f"{holder}.") for holder in experts):
            raise KTError(
                f"quantization_config, quantization_bit: {key} is quantised in the checkpoint already, which "
                "bitsandbytes would take for plain numbers. Leave it out."
            )
    blocks = {name.rpartition(".")[0]: layer.block for name, layer in find(model).items()}
    return [
        f"{name}.{child}"
        for name, block in blocks.items()
        for child, module in block.named_children()
        if isinstance(module, nn.Linear)
    ]


def with_skipped(quantised: Any, modules: list[str]) -> Any:
    """bitsandbytes' configuration with some more modules left as they are."""
    if modules:
        quantised = copy.deepcopy(quantised)
        quantised.llm_int8_skip_modules = [*(quantised.llm_int8_skip_modules or ["lm_head"]), *modules]
    return quantised
