"""Whether an adapter is of a model, from configuration files, headers and the adapter itself."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ktmoe.adapters import PREFIX, Adapter, checkpoint_layout, read_adapter
from ktmoe.checkpoints import CheckpointNames
from ktmoe.convert.changes import MERGE_THERE, REPLACED, parameter_of
from ktmoe.models import find, names_on_disk
from ktmoe.types import KTError


def fit(source: str, adapter_path: str, hub: Mapping[str, Any]) -> tuple[CheckpointNames, Adapter, nn.Module]:
    """The adapter, and the class of model that it fits: the causal language model, else the one in config.json.

    Args:
        source: the model's folder.
        adapter_path: a folder, or a name on the hub.
        hub: `subfolder`, `revision` ... of the adapter.

    Raises:
        KTError: no such adapter, or one of another model.
    """
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise KTError(f"{source}: {error}") from error
    architecture = getattr(transformers, (config.architectures or ["-"])[0], None)
    makers = [AutoModelForCausalLM.from_config, *([architecture._from_config] if architecture else [])]
    refused: list[KTError] = []
    for make in makers:
        try:
            with torch.device("meta"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = make(config)
        except (ValueError, KeyError, AttributeError, TypeError) as error:  # not that kind of model
            refused.append(KTError(f"{source}: transformers makes no model of it ({error})."))
            continue
        try:
            found = find(model)
            shapes = {name: layer.shape() for name, layer in found.items()}
            adapter = read_adapter(adapter_path, shapes, checkpoint_layout(config.model_type), **hub)
            _check_modules(adapter, model)
        except KTError as error:
            refused.append(error)
            continue
        return names_on_disk(model, found), adapter, model
    raise refused[0]


def _check_modules(adapter: Adapter, model: nn.Module) -> None:
    """Refuses an adapter that is not of this model, or not plain LoRA."""
    parameters = {n: tuple(p.shape) for n, p in model.named_parameters()}
    for key, tensor in adapter.rest.items():
        if REPLACED in key:
            continue
        name, lora, side = key.removeprefix(PREFIX).partition(".lora_")
        if not lora:
            there = parameters.get(parameter_of(key), "no parameter of that name")
            if there != tuple(tensor.shape):
                raise KTError(
                    f"{adapter.source}: {key} {tuple(tensor.shape)} does not fit the model, which has {there}. "
                    f"{MERGE_THERE}"
                )
        elif f"{name}.weight" not in parameters:
            raise KTError(f"{adapter.source}: {key} does not fit the model, which has no {name}.weight.")
        elif side not in ("A.weight", "B.weight", "embedding_A", "embedding_B") or tensor.dim() != 2:
            raise KTError(f"{adapter.source}: {key} is more than plain LoRA. {MERGE_THERE}")
        else:
            out, inner = parameters[f"{name}.weight"][:: -1 if side.startswith("embedding") else 1]
            here, wanted = (tensor.shape[1], inner) if "A" in side else (tensor.shape[0], out)
            if here != wanted:
                raise KTError(f"{adapter.source}: {key} is {tuple(tensor.shape)}; the model has {wanted} for {here}.")
    config: Any = model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if getattr(text, "tie_word_embeddings", False):
        ends = {id(m) for m in (model.get_input_embeddings(), model.get_output_embeddings())}  # type: ignore[operator]
        tied = [n for n, m in model.named_modules() if id(m) in ends]
        hit = [
            k for k in adapter.rest if any(k.startswith((f"{PREFIX}{n}.lora_", f"{PREFIX}{n}.weight")) for n in tied)
        ]
        if hit:
            raise KTError(
                f"{adapter.source}: {hit[0]} is of an embedding that this model shares between input and output; a "
                f"merged checkpoint would change both. {MERGE_THERE}"
            )
