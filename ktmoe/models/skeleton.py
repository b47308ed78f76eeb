"""A model without weights: what its configuration alone says of its routed experts, and of an adapter to come."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn

from ktmoe.adapters import check_lora_config
from ktmoe.checkpoints import Checkpoint
from ktmoe.config import KTConfig
from ktmoe.models.families import Layer, expert_modules, find, names_on_disk
from ktmoe.planning import plan
from ktmoe.split import left_on_cpu, on_device
from ktmoe.types import ExpertWeights, KTError, MoEShape


if TYPE_CHECKING:
    from peft import LoraConfig


def check_model(
    model_config: Any,
    config: KTConfig,
    r: int,
    lora: LoraConfig | None = None,
    *,
    stored: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Refuses, from the configuration alone, a model or an adapter that `attach` would refuse. Nothing is loaded.

    Args:
        model_config: a transformers configuration.
        config: which backend.
        r: LoRA rank, where `lora` does not say it.
        lora: the adapter to come.
        stored: the format of the experts' weights, as `plan` takes it.
        trust_remote_code: whether the model's own code may be run.

    Raises:
        KTError: as `attach`.
    """
    model = make_skeleton(model_config, trust_remote_code)
    found = find(model)
    shapes = _shapes(found, r if lora is None else check_lora(lora, model, found))
    for name, layer in found.items():
        on_device(config, layer.shape(), name)
    for shape in shapes:
        plan(config, left_on_cpu(config, shape), stored)


def check_lora(lora: LoraConfig, model: nn.Module, found: Mapping[str, Layer]) -> int:
    """Refuses an adapter that the model cannot have.

    Returns:
        The largest rank that it gives the experts.
    """
    experts = {name: layer.num_experts for name, layer in found.items()}
    return check_lora_config(lora, model, experts, [h for holders in expert_modules(model).values() for h in holders])


def auto_class(model_config: Any) -> Any:
    """The auto class that makes a configuration's language model: with its vision part, where it has one."""
    seeing = getattr(transformers, "AutoModelForImageTextToText", None)
    seen = seeing is not None and type(model_config) in seeing._model_mapping
    return seeing if seen else transformers.AutoModelForCausalLM


def expert_shapes(model_config: Any, r: int, *, trust_remote_code: bool = False) -> list[MoEShape]:
    """The sizes of a model's MoE layers, each once, from the configuration alone.

    Raises:
        KTError: no MoE layer, experts that are not plain, remote code that does not run here, or a rank that is no
            whole number above zero.
    """
    return _shapes(find(make_skeleton(model_config, trust_remote_code)), r)


def layers_of(model_config: Any, r: int, *, trust_remote_code: bool = False) -> tuple[list[MoEShape], int]:
    """The sizes of every MoE layer of a model, and how many parameters it has besides, from the configuration alone.

    Raises:
        KTError: as `expert_shapes`.
    """
    model = make_skeleton(model_config, trust_remote_code)
    found = find(model)
    _shapes(found, r)
    shapes = [replace(layer.shape(), rank=r) for layer in found.values()]
    routed = sum(3 * s.num_experts * s.hidden_size * s.intermediate_size for s in shapes)
    return shapes, sum(p.numel() for p in model.parameters()) - routed


def _shapes(found: Mapping[str, Layer], r: int) -> list[MoEShape]:
    if isinstance(r, bool) or not isinstance(r, int) or r < 1:
        raise KTError(f"lora_rank: got {r!r}; expected a whole number of at least 1.")
    return list(dict.fromkeys(replace(layer.shape(), rank=r) for layer in found.values()))


def experts_in(model: nn.Module, checkpoint: Checkpoint) -> dict[str, ExpertWeights]:
    """The routed experts in a checkpoint, by the name that their module has in the model. Nothing is loaded.

    Args:
        model: from `make_skeleton`.
        checkpoint: its files.

    Raises:
        KTError: as `attach`; or matrices that are missing, there twice, or of another shape.
    """
    return on_disk(model, find(model), checkpoint)


def on_disk(model: nn.Module, found: Mapping[str, Layer], checkpoint: Checkpoint) -> dict[str, ExpertWeights]:
    shapes = {name: layer.shape() for name, layer in found.items()}
    sizes = {name: (s.num_experts, s.intermediate_size, s.hidden_size) for name, s in shapes.items()}
    return checkpoint.experts(sizes, names_on_disk(model, found))


def make_skeleton(model_config: Any, trust_remote_code: bool = False) -> nn.Module:
    """The model without weights.

    Raises:
        KTError: transformers has no such model, or its remote code does not run here.
    """
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made: nn.Module = auto_class(model_config).from_config(model_config, trust_remote_code=trust_remote_code)
            return made
    except (ValueError, KeyError, AttributeError, ImportError, TypeError) as error:
        if trust_remote_code:
            raise KTError(
                f"trust_remote_code: the remote code of {type(model_config).__name__} does not run with transformers "
                f"{transformers.__version__} ({error}). Use a release that it was written for (DeepSeek's: 4.40 to "
                "4.53), or one that has the model itself. Kimi-K2 is DeepSeek-V3 to transformers: write model_type: "
                "deepseek_v3 into its config.json."
            ) from error
        raise KTError(f"transformers has no language model for {type(model_config).__name__}: {error}") from error
