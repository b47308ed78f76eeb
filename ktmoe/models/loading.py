"""`load_model`: a model from disk whose routed experts transformers never loads; they are streamed to a backend."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, cast
from unittest import mock

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ktmoe.checkpoints import HUB, OPTIONS, Checkpoint, CheckpointNames, is_stored, refuse_quantised, stored_format
from ktmoe.config import KTConfig
from ktmoe.models.arguments import (
    PLACES,
    UnknownArgument,
    check_arguments,
    configurations,
    model_configuration,
    options_for,
    whose,
)
from ktmoe.models.attaching import attach
from ktmoe.models.families import expert_modules
from ktmoe.models.rest_in_bits import linear_routers, with_skipped
from ktmoe.models.skeleton import auto_class, check_model, experts_in, layers_of, make_skeleton
from ktmoe.planning import plan
from ktmoe.processes import check_launch
from ktmoe.room import check_least
from ktmoe.split import check_device, left_on_cpu
from ktmoe.types import KTError, MoEShape


if TYPE_CHECKING:
    from peft import LoraConfig


def load_model(
    path: str | os.PathLike[str],
    config: KTConfig | PretrainedConfig | None = None,
    lora: LoraConfig | None = None,
    r: int | None = None,
    *,
    kt_config: KTConfig | None = None,
    **from_pretrained: Any,
) -> Any:
    """A language model from disk or the hub, its routed experts run by ktmoe.

    transformers loads everything else, where `device_map` says. The experts stay in their memory-mapped files: the
    kernel packs them from there layer by layer, and the torch backend computes straight from them.

    Args:
        path: a directory, or a name on the hub. Which files in it are the model is for transformers to say.
        config: which backend, threads, limits; or, as for `from_pretrained`, transformers' own configuration.
        lora: if given, the adapter is added too, on the experts and on the rest.
        r: the largest LoRA rank that adapters will have, where `lora` does not say it.
        kt_config: which backend, threads, limits, where `config` is transformers'.
        **from_pretrained: what `AutoModelForCausalLM.from_pretrained` takes: values for the configuration
            (`use_cache`, `attention_dropout`), `quantization_config` (a BitsAndBytesConfig, for what is not routed
            experts), `dtype`, `device_map`, `attn_implementation`, `revision`, `variant`,
            `trust_remote_code` (used only where transformers has no class of its own) ...

    Returns:
        The model, or a PeftModel around it if `lora` was given. With `output_loading_info`, that and transformers'
        account of it.

    Raises:
        KTError: an argument that does not exist or has no meaning here; a quantised checkpoint; shards that are
            missing, damaged, incomplete or of another model; or as `attach`.
        KernelError: the kernel failed a check.

    Examples:
        >>> config = ktmoe.KTConfig(kt_backend="torch")
        >>> model = ktmoe.load_model(model_path, config, lora=peft.LoraConfig(r=8, target_modules="all-linear"))
        >>> model(input_ids=torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()
        >>> model.save_pretrained(new_path)  # the adapter, as stock peft reads it
    """
    check_launch()
    given, kt_config = configurations(config, kt_config)
    check_arguments(from_pretrained)
    model_config, trust, rest = model_configuration(path, given, from_pretrained)
    hub = {k: v for k, v in from_pretrained.items() if k in HUB}
    refuse_quantised(path, model_config)
    kind = stored_format(model_config)
    stored = forget_stored(model_config)
    check_model(model_config, kt_config, r or 1, lora, stored=kind or None, trust_remote_code=trust)
    checkpoint = Checkpoint(
        path,
        transformers_weights=getattr(model_config, "transformers_weights", None),
        **{k: v for k, v in from_pretrained.items() if k in OPTIONS},
    )
    check_headers(model_config, checkpoint, kt_config, trust)
    if rest.get("quantization_config") is not None:
        skipped = linear_routers(make_skeleton(model_config, trust), checkpoint)
        rest["quantization_config"] = with_skipped(rest["quantization_config"], skipped)
    asked_info = rest.pop("output_loading_info", False)
    _check_memory(model_config, kt_config, kind, from_pretrained, trust)
    options = options_for({**rest, **hub}, torch.bfloat16 if stored or checkpoint.stored_keys() else "auto")
    with without_experts():
        try:
            model, info = auto_class(model_config).from_pretrained(
                path, config=model_config, trust_remote_code=trust, **options
            )
        except TypeError as error:
            if "unexpected keyword" not in str(error):
                raise
            raise UnknownArgument(f"load_model: {error}{whose(options)}") from error
    _check_on_devices(model)
    _check_rest(model, checkpoint, info)
    loaded = stream(model, checkpoint, kt_config, lora, r)
    return (loaded, info) if asked_info else loaded


def _check_memory(
    model_config: Any, config: KTConfig, stored: str, from_pretrained: Mapping[str, Any], trust: bool
) -> None:
    """Refuses weights that cannot fit, from the configuration alone."""
    shapes, others = layers_of(model_config, 1, trust_remote_code=trust)
    on_host = str(from_pretrained.get("device_map")) in ("None", "cpu")
    size = 0.5 if from_pretrained.get("quantization_config") else 2  # bytes of a number, at least
    check_device(config, shapes)
    shapes = [left_on_cpu(config, shape) for shape in shapes]
    check_least(config, shapes, stored, rest=int(size * others) if on_host else 0)


def check_headers(
    model_config: Any, checkpoint: Checkpoint, config: KTConfig, trust_remote_code: bool = False
) -> None:
    """Refuses, from the headers alone, what is incomplete, holds no floating-point numbers, or no backend can take.

    Raises:
        KTError: names the file and the key.
    """
    model = make_skeleton(model_config, trust_remote_code)
    for weights in experts_in(model, checkpoint).values():
        e, h, i = weights.num_experts, weights.hidden_size, weights.intermediate_size
        plan(config, left_on_cpu(config, MoEShape(e, h, i, top_k=1, rank=1)), weights.stored)
    checkpoint.check_numbers(CheckpointNames(model, ()), dict(model.named_parameters()))


def _check_on_devices(model: nn.Module) -> None:
    """Refuses a model that transformers left without weights. accelerate's hooks bring in what it offloaded."""
    for name, module in model.named_modules():
        lost = [p for p, value in module.named_parameters(name, recurse=False) if value.is_meta]
        if lost and not hasattr(module, "_hf_hook"):
            raise KTError(f"device_map: {lost[0]} has no weights: transformers left it on the meta device. {PLACES}")


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
    dequantised = {names.parameter(key, tensors) for key in checkpoint.stored_keys()}  # by `stream`
    missing = sorted(set(map(str, info["missing_keys"])) - dequantised)
    if missing:
        raise KTError(
            f"{checkpoint.path}: {len(missing)} tensors are missing, e.g. {', '.join(missing[:3])}. The files or "
            "config.json are incomplete or of another model."
        )


def forget_stored(model_config: Any) -> bool:
    """Takes a quantisation that `stream` dequantises off a configuration: transformers' own ways need a GPU or more.

    Returns:
        Whether it was there. The parameters of the model are bare FP8 numbers, or not there, until `stream`.
    """
    if not is_stored(model_config):
        return False
    for key in ("quantization_config", "compression_config"):
        if hasattr(model_config, key):
            delattr(model_config, key)
    return True


def _dequantise(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Gives the parameters outside the experts what their quantised numbers and scales mean, in place.

    Raises:
        KTError: such a parameter is not in memory (`device_map` offloads it).
    """
    parameters = dict(model.named_parameters())
    names = CheckpointNames(model, ())
    dtype = cast(Any, model).get_input_embeddings().weight.dtype
    for key in checkpoint.stored_keys():
        name = names.parameter(key, parameters)
        if name is None:  # an expert's, or of a layer that the model does not build
            continue
        if parameters[name].is_meta:
            raise KTError(
                f"device_map: {name} is offloaded, and quantised weights are dequantised in memory. Leave it out."
            )
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

    Parameters that transformers read as bare numbers, or not at all (`forget_stored`), are dequantised.

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
